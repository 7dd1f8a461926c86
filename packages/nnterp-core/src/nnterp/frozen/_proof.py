"""Prove on a short probe that what is to be held still is: the same numbers, and a backward pass that is linear."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import GradientEdge

from nnterp.anatomy import Anatomy
from nnterp.discovery import probe_ids, quiet, rounding_of, silent_weights, sounding
from nnterp.frozen._audit import Way, edge, way
from nnterp.frozen._holding import Holding
from nnterp.frozen._kinds import FROZEN
from nnterp.frozen._parts import FrozenParts, find_parts
from nnterp.huggingface import input_embedding, uncached, with_logits
from nnterp.tensors import stream_in, stream_out
from nnterp.wording import generic_path

LENGTH = 8
Ends = tuple[str, str]


@dataclass(frozen=True)
class FrozenProof:
    """What of one model can be held still.

    Attributes:
        parts: Where attentions, norms and feed-forwards are.
        reasons: Kind → why it is refused, for the kinds that are.
        error: The largest relative error of a part's output as its Jacobian times its input, plus its biases' share.
    """

    parts: FrozenParts
    reasons: dict[str, str]
    error: float = 0.0


@dataclass
class _Call:
    """One call of a part: where its input and its output stand in autograd's graph, and their numbers."""

    start: GradientEdge
    given: torch.Tensor
    end: GradientEdge | None = None
    made: torch.Tensor | None = None


@dataclass
class _Run:
    """A forward pass on the probe with everything held still."""

    calls: dict[Ends, list[_Call]]
    stream: tuple[GradientEdge, GradientEdge] | None
    outputs: list[torch.Tensor] = field(default_factory=list)


def prove(module: nn.Module, anatomy: Anatomy) -> FrozenProof:
    """Try every kind of `FROZEN` on a HuggingFace module.

    Held still are first all activations as gates. A feed-forward whose output then does not depend on its input any
    more has no other branch: its activation is no gate, and its slope is held instead.
    """
    with _on_probe(module):
        parts = find_parts(module, anatomy)
        try:
            plain = _forward(module, parts, (), anatomy)
            first = _forward(module, parts, FROZEN, anatomy)
            cut = [
                ends
                for ends in parts.mlps
                if (calls := first.calls.get(ends)) and not any(_between(call).depends for call in calls)
            ]
            parts = dataclasses.replace(parts, plain=frozenset(cut))
            run = _forward(module, parts, FROZEN, anatomy) if cut else first
        except Exception as error:
            why = f"the model could not be run with it on a probe ({type(error).__name__}: {error!s:.200})"
            return FrozenProof(parts, dict.fromkeys(FROZEN, why))
        return _judge(module, anatomy, parts, plain, run)


@contextlib.contextmanager
def _on_probe(module: nn.Module) -> Iterator[None]:
    """Only biases require a gradient, weights that are all zero are replaced, and the module is left as it was."""
    kept = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    try:
        with quiet(module), sounding(module, silent_weights(module)), torch.enable_grad():
            for name, parameter in module.named_parameters():
                parameter.requires_grad_(parameter.is_floating_point() and _is_bias(name))
            yield
    finally:
        for parameter, required in kept:
            parameter.requires_grad_(required)


def _is_bias(name: str) -> bool:
    return name.rpartition(".")[2].endswith("bias")


def _forward(module: nn.Module, parts: FrozenParts, kinds: tuple[str, ...], anatomy: Anatomy) -> _Run:
    """Run the probe, and keep where the inputs and outputs of all parts stand in the graph."""
    ids = probe_ids(module, anatomy.sizes.vocab_size, 1, LENGTH, seed=11)
    calls: dict[Ends, list[_Call]] = {}
    handles, outputs, ends_of_stream = [], [], []

    def begin_graph(_: nn.Module, args: tuple, output: Any) -> None:
        stream = stream_out(output)
        if stream is not None and stream.is_floating_point() and not stream.requires_grad:
            stream.requires_grad_(True)

    def before(_: nn.Module, args: tuple, kwargs: dict[str, Any], ends: Ends) -> None:
        stream = stream_in(args, kwargs)
        if stream is not None:
            if not stream.requires_grad:
                stream.requires_grad_(True)
            calls.setdefault(ends, []).append(_Call(edge(stream), stream.detach().clone()))

    def after(_: nn.Module, args: tuple, output: Any, ends: Ends) -> None:
        stream = stream_out(output)
        if stream is not None and calls.get(ends) and stream.requires_grad:
            calls[ends][-1].end, calls[ends][-1].made = edge(stream), stream.detach().clone()

    def layer_begins(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        stream = stream_in(args, kwargs)
        if stream is not None and not ends_of_stream:
            if not stream.requires_grad:
                stream.requires_grad_(True)
            ends_of_stream.append(edge(stream))

    def layer_ends(_: nn.Module, args: tuple, output: Any) -> None:
        stream = stream_out(output)
        if stream is not None:
            outputs.append(stream.detach().clone())
            if stream.requires_grad:
                ends_of_stream[1:] = [edge(stream)]

    embedding = input_embedding(module)
    if embedding is not None:
        handles.append(embedding.register_forward_hook(begin_graph))
    everything: list[Ends] = [*parts.attentions, *parts.mlps, *((path, path) for path in parts.norms)]
    try:
        for ends in dict.fromkeys(everything):
            entry, exit_ = (module.get_submodule(path) for path in ends)
            handles.append(
                entry.register_forward_pre_hook(lambda m, a, k, e=ends: before(m, a, k, e), with_kwargs=True)
            )
        with Holding(module, parts, kinds):  # its hooks see what modules return first
            for ends in dict.fromkeys(everything):
                handles.append(
                    module.get_submodule(ends[1]).register_forward_hook(lambda m, a, o, e=ends: after(m, a, o, e))
                )
            for path in parts.layers:
                layer = module.get_submodule(path)
                handles.append(layer.register_forward_pre_hook(layer_begins, with_kwargs=True))
                handles.append(layer.register_forward_hook(layer_ends))
            logits = with_logits(module(input_ids=ids, **uncached(module))).logits
    finally:
        for handle in handles:
            handle.remove()
    stream = (ends_of_stream[0], ends_of_stream[1]) if len(ends_of_stream) == 2 else None
    return _Run(calls, stream, [*outputs, logits.detach()])


def _between(call: _Call) -> Way:
    return Way(False, (), ()) if call.end is None else way(call.end, [call.start])


def _judge(module: nn.Module, anatomy: Anatomy, parts: FrozenParts, plain: _Run, run: _Run) -> FrozenProof:
    """What the runs show of each kind."""
    reasons: dict[str, str] = {}

    def refuse(kind: str, why: str) -> None:
        reasons.setdefault(kind, why)

    if len(plain.outputs) != len(run.outputs) or not all(map(torch.equal, plain.outputs, run.outputs)):
        return FrozenProof(parts, dict.fromkeys(FROZEN, "the forward pass does not give the same numbers with it"))
    for _, exit_, kind in parts.mixers:
        for name in ("patterns", "gates"):
            refuse(name, f"{generic_path(exit_)} is a {kind} mixer, which has no pattern and no single gate to hold")
    tolerance = max(1e-3, 32 * rounding_of(module))
    largest = 0.0
    own = {"norms": [(path, path) for path in parts.norms], "patterns": parts.attentions, "gates": parts.mlps}
    for name, ends in ((name, ends) for name, all_ends in own.items() for ends in all_ends):
        for call in run.calls.get(ends, []):
            where = generic_path(ends[0] if ends[0] == ends[1] else f"{ends[0]} → {ends[1]}")
            found = _between(call)
            if not found.depends:
                refuse(name, f"with it, the output of {where} does not depend on its input")
                continue
            for operation in found.bad:
                refuse(_kind_of(operation, name), f"{where} is not linear with it ({operation})")
            if not found.bad:
                error = _incompleteness(call, found.leaves)
                largest = max(largest, error)
                if not error <= tolerance:
                    refuse(
                        name,
                        f"the output of {where} is not its Jacobian times its input, plus its biases' share, with it "
                        f"(relative error {error:.1e}, tolerance {tolerance:.0e})",
                    )
    if run.stream is not None:
        for operation in way(run.stream[1], [run.stream[0]]).bad:
            kind = _kind_of(operation, "")
            if kind or not parts.mixers:
                refuse(kind or "gates", f"{operation} stands on the way from the first layer to the last")
    return FrozenProof(parts, {kind: reasons[kind] for kind in FROZEN if kind in reasons}, largest)


_OF_NORMS = ("Rsqrt", "NativeLayerNorm", "FusedRmsNorm", "LinalgVectorNorm", "Norm", "Std", "Var", "NativeGroupNorm")
_OF_PATTERNS = ("Softmax", "ScaledDotProduct", "Bmm", "Baddbmm", "FlashAttn", "FlexAttention")
_OF_GATES = (
    *("Silu", "Gelu", "Relu", "Sigmoid", "Tanh", "Softplus", "Mish", "Hardswish", "Elu", "LeakyRelu", "Glu", "Clamp"),
)


def _kind_of(operation: str, default: str) -> str:
    """Which kind an operation that is not linear belongs to."""
    name = operation.split("Backward")[0]
    for kind, names in (("norms", _OF_NORMS), ("patterns", _OF_PATTERNS), ("gates", _OF_GATES)):
        if name.startswith(names) and not (kind == "patterns" and default == "gates"):
            return kind
    return default


def _incompleteness(call: _Call, biases: tuple[torch.Tensor, ...]) -> float:
    """How far a part's output is from its Jacobian times its input plus its biases' share, along one direction."""
    assert call.end is not None and call.made is not None
    made = call.made.double()
    weight = 0.5 + torch.rand(made.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(made.device)
    along = (made * weight).to(call.made.dtype)
    inputs: list[Any] = [call.start, *biases]
    slopes = torch.autograd.grad([call.end], inputs, [along], retain_graph=True, allow_unused=True)  # type: ignore[arg-type]
    terms = zip(slopes, [call.given, *biases], strict=True)
    total = sum(float((slope.double() * x.detach().double()).sum()) for slope, x in terms if slope is not None)
    expected = float((along.double() * made).sum())
    return abs(total - expected) / max(abs(expected), 1e-30)
