"""Find the experts of a mixture, and prove that what they return, times their weights, is what the mixture adds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nnterp.anatomy import Layer
from nnterp.discovery._fitting import fit
from nnterp.discovery._probe import Probe
from nnterp.discovery._recording import Call, Recording
from nnterp.discovery._routers import NO_EXPERTS, recorded_router
from nnterp.tensors import copied, same, stream_out
from nnterp.traced import EveryExpert, Experts, Place, Routed, one_column

CHOICES, WEIGHTS = "router_choices", "expert_weights"
OUTPUTS, CONTRIBUTIONS = "expert_outputs", "expert_contributions"
NAMES = (CHOICES, WEIGHTS, OUTPUTS, CONTRIBUTIONS)

NO_MODULE = "no module of it is given the chosen experts of each token and returns what they make of it"
NO_SUM = "its experts' module does not return the weighted sum of what it returns for one expert at a time"
NOT_LINEAR = "its experts do not return their output times the weight: expert_contributions has both together"
NOT_ADDED = (
    "more than a factor stands between what its experts return and what the mixture returns, such as a norm: "
    "expert_outputs and expert_weights have what is before it"
)
NO_COUNT = "it is not known how many experts it has"
EVERY = "every expert runs on every token, its input times its weight: expert_contributions has what they return"

Key = int | str
Found = dict[str, Place | str]


@dataclass(frozen=True)
class _Proof:
    """What is proven of experts that run the same code.

    Attributes:
        no_outputs, no_contributions: Why there are none, or None.
        factor: What the mixture multiplies its experts' sum by.
        columns: How many experts the module must be given for each token; of two, the second has no weight.
    """

    no_outputs: str | None
    no_contributions: str | None
    factor: float = 1.0
    columns: int = 1


class ExpertsFinder:
    """Finds the experts of one model's layers. Layers whose experts run the same code share one proof.

    Args:
        probe: A short prompt for the model.
        recording: A forward pass of the probe in which the calls of all modules were recorded.
    """

    def __init__(self, probe: Probe, recording: Recording) -> None:
        self.probe, self.recording = probe, recording
        self.proven: dict[tuple[type, type], _Proof] = {}

    def of(self, layer: Layer) -> Found:
        """Name → place of one layer, or the reason why there is none."""
        if layer.mlp is None or not layer.mixture_of_experts:
            return dict.fromkeys(NAMES, NO_EXPERTS)
        tokens = self.probe.ids.numel()
        for path in sorted(self.recording.calls, key=len):
            if not path.startswith(f"{layer.path}."):
                continue
            call = self.recording.calls[path][0]
            keys = _routed(call, tokens)
            if keys is not None:
                return self.chosen(layer, path, call, keys)
            experts = self.count(layer, path)
            if experts is not None and _is_every(call, experts[0], tokens):
                return self.every(path, *experts)
        return dict.fromkeys(NAMES, NO_MODULE)

    def chosen(self, layer: Layer, path: str, call: Call, keys: tuple[Key, Key, Key]) -> Found:
        """The places of experts that run on the tokens sent to them."""
        experts = self.count(layer, path)
        kinds = type(self._module(layer.path)), type(self._module(path))
        if kinds not in self.proven:
            self.proven[kinds] = self.proof(path, call, keys)
        proof = self.proven[kinds]
        largest = int(_argument(call, keys[1]).max())
        number, count = experts or (0, "")
        no_sum = proof.no_contributions or (NO_COUNT if number <= largest else None)
        return {
            CHOICES: Routed(path, keys[1]),
            WEIGHTS: Routed(path, keys[2], proof.factor),
            OUTPUTS: proof.no_outputs or Experts(path, keys, "outputs", count, 1.0, proof.columns),
            CONTRIBUTIONS: no_sum or Experts(path, keys, "contributions", count, proof.factor, proof.columns),
        }

    def every(self, path: str, experts: int, count: str) -> Found:
        """The places of experts that run on all tokens."""
        made = stream_out(self.recording.calls[path][0].output)
        assert made is not None
        added = self.added(path)
        total = made.unflatten(0, (experts, -1)).sum(0)
        right = added is not None and same(added.reshape(total.shape), total, self.probe.tolerance)
        return {**dict.fromkeys(NAMES, EVERY), CONTRIBUTIONS: EveryExpert(path, count) if right else NOT_ADDED}

    def proof(self, path: str, call: Call, keys: tuple[Key, Key, Key]) -> _Proof:
        """What is proven of the experts' module at a path."""
        whole, tolerance = stream_out(call.output), self.probe.tolerance
        assert whole is not None
        weights = _argument(call, keys[2])
        try:
            columns, weighted = 1, self.one_by_one(path, call, keys, weights, 1)
        except ValueError:  # LongCat-Flash drops an axis of one
            columns, weighted = 2, self.one_by_one(path, call, keys, weights, 2)
        plain = self.one_by_one(path, call, keys, torch.ones_like(weights), columns)
        if not same(weighted.sum(1).reshape(whole.shape), whole, tolerance):
            return _Proof(NO_SUM, NO_SUM)
        no_outputs = None if same(plain * weights[..., None], weighted, tolerance) else NOT_LINEAR
        added = self.added(path)
        if added is None or added.numel() != whole.numel():  # of another width: a projection follows (Muse Spark)
            return _Proof(no_outputs, NOT_ADDED, columns=columns)
        found = fit(added.reshape(whole.shape), [whole], per_channel=False)
        if found.error > tolerance or not found.whole:
            return _Proof(no_outputs, NOT_ADDED, columns=columns)
        (factor,) = found.scales
        assert isinstance(factor, float)
        return _Proof(no_outputs, None, factor, columns)

    def one_by_one(
        self, path: str, call: Call, keys: tuple[Key, Key, Key], weights: torch.Tensor, columns: int
    ) -> torch.Tensor:
        """What the module returns for each chosen expert of each token by itself, `[tokens, chosen, hidden]`."""
        tokens, chosen = _argument(call, keys[0]), _argument(call, keys[1])
        flat, made = tokens.reshape(-1, tokens.shape[-1]), []
        for slot in range(chosen.shape[1]):
            index, weight = one_column(chosen[:, slot], weights[:, slot], columns)
            given = dict(zip(keys, (flat.reshape(tokens.shape), index, weight), strict=True))
            made.append(self._call(path, call, given).reshape(flat.shape[0], -1))
        return torch.stack(made, 1)

    def added(self, path: str) -> torch.Tensor | None:
        """How much of the mixture's output is there only because the experts' module returns what it returns."""
        block = path.rpartition(".")[0]
        call = self.recording.call(block)
        whole = None if call is None else stream_out(call.output)
        if call is None or whole is None:
            return None

        def nothing(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
            return torch.zeros_like(output)

        handle = self._module(path).register_forward_hook(nothing)
        try:
            without = stream_out(self._module(block)(*copied(call.args), **named(call)))
        finally:
            handle.remove()
        return None if without is None else whole - without

    def count(self, layer: Layer, path: str) -> tuple[int, str] | None:
        """How many experts a layer has, and the attribute of its experts' module that says so or holds as many.

        As many as the router scores; else as the module says, because the router may also score an expert that does
        nothing (Zaya). Where no module returns scores, and the module says several numbers (LongCat-Flash in
        transformers 5.16), that of the matrices in its largest parameter. None if none is known.
        """
        module, router = self._module(path), recorded_router(self.probe.module, layer)
        named = [(value, name) for name, value in vars(module).items() if type(value) is int and "expert" in name]
        held = [(p.shape[0], name) for name, p in module.named_parameters(recurse=False) if p.dim() == 3]
        call = None if router is None else self.recording.call(router[0])
        stated = next((pair for pair in named if pair[1] in ("num_experts", "moe_num_experts")), None)
        if router is None or call is None:
            most = max((number for number, _ in held), default=0)
            return stated or next((pair for pair in named if pair[0] == most), None)
        scores = call.output if isinstance(call.output, torch.Tensor) else call.output[router[1]]
        return next((pair for pair in (*named, *held) if pair[0] == scores.shape[-1]), stated)

    def _call(self, path: str, call: Call, changed: dict[Key, torch.Tensor]) -> torch.Tensor:
        args = tuple(changed.get(i, x) for i, x in enumerate(copied(call.args)))
        kwargs = {**named(call), **{k: v for k, v in changed.items() if isinstance(k, str)}}
        made = stream_out(self._module(path)(*args, **kwargs))
        assert made is not None
        return made

    def _module(self, path: str) -> nn.Module:
        return self.probe.module.get_submodule(path)


def _routed(call: Call, tokens: int) -> tuple[Key, Key, Key] | None:
    """Which arguments of a call are the tokens, the chosen experts and their weights; None if it has others."""
    given: dict[Key, Any] = dict((*enumerate(call.args), *call.kwargs.items()))
    tensors = {key: x for key, x in given.items() if isinstance(x, torch.Tensor)}
    made = call.output
    whole = [key for key, x in tensors.items() if not x.is_floating_point() and x.dim() == 2 and len(x) == tokens]
    if len(whole) != 1 or not isinstance(made, torch.Tensor):
        return None
    weights = [k for k, x in tensors.items() if x.is_floating_point() and x.shape == tensors[whole[0]].shape]
    streams = [k for k, x in tensors.items() if x.is_floating_point() and x.shape == made.shape and k not in weights]
    return (streams[0], whole[0], weights[0]) if len(weights) == len(streams) == 1 else None


def _is_every(call: Call, experts: int, tokens: int) -> bool:
    """Whether a module was given one tensor, every token for every expert, and returned as many."""
    made = call.output
    given = [x for x in (*call.args, *call.kwargs.values()) if isinstance(x, torch.Tensor)]
    if not isinstance(made, torch.Tensor) or len(given) != 1:
        return False
    return made.shape[:-1] == given[0].shape[:-1] == (experts * tokens,)


def _argument(call: Call, key: Key) -> torch.Tensor:
    return call.kwargs[key] if isinstance(key, str) else call.args[key]


def named(call: Call) -> dict[str, Any]:
    """Copies of a call's keyword arguments."""
    return {name: copied(x) for name, x in call.kwargs.items()}
