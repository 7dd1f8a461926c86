"""Prove on a short probe that what is to be held still is: the same numbers, and a backward pass that is linear."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import GradientEdge, Node

from nnterp.anatomy import Anatomy
from nnterp.discovery import probe_ids, quiet, rounding_of, silent_weights, sounding
from nnterp.frozen._audit import Way, edge, way
from nnterp.frozen._holding import Holding
from nnterp.frozen._kinds import FROZEN
from nnterp.frozen._parts import FrozenParts, find_parts
from nnterp.huggingface import input_embedding, uncached, with_logits
from nnterp.tensors import same, stream_in, stream_out
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
    """One call of a part: where its inputs and its output stand in autograd's graph, and their numbers."""

    starts: list[GradientEdge]
    given: list[torch.Tensor]
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

    Held still are first all activations as gates. Where a feed-forward's output is then not made of its input any more,
    there is no other branch: its activation is no gate, and its slope is held instead.
    """
    tolerance = max(1e-3, 32 * rounding_of(module))
    with _on_probe(module):
        parts = find_parts(module, anatomy)
        try:
            plain = _forward(module, parts, (), anatomy)
            first = _forward(module, parts, FROZEN, anatomy)
            cut = [ends for ends in parts.mlps if any(_misses(call, tolerance) for call in first.calls.get(ends, []))]
            parts = dataclasses.replace(parts, plain=frozenset(cut))
            run = _forward(module, parts, FROZEN, anatomy) if cut else first
        except Exception as error:
            why = f"the model could not be run with it on a probe ({type(error).__name__}: {error!s:.200})"
            return FrozenProof(parts, dict.fromkeys(FROZEN, why))
        return _judge(parts, plain, run, tolerance)


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

    def begin_graph(_: nn.Module, args: tuple, output: Any) -> Any:
        stream = stream_out(output)
        return _afresh(stream)[1] if stream is output and stream.is_floating_point() else None

    def before(_: nn.Module, args: tuple, kwargs: dict[str, Any], ends: Ends) -> Any:
        stream = stream_in(args, kwargs)
        if stream is None or not torch.is_grad_enabled():  # an index, chosen without gradients
            return None
        call = _Call([edge(stream)], [stream.detach().clone()]) if stream.requires_grad else _Call([], [])

        def apart(x: Any) -> Any:
            """Another input as a leaf, so that what it shares with the first is not counted twice (BLOOM's stream)."""
            if x is stream and stream.requires_grad or not (isinstance(x, torch.Tensor) and x.is_floating_point()):
                return x
            if x is not stream and not x.requires_grad:
                return x
            leaf, clone = _afresh(x)
            if x is stream or ends not in norms:  # a norm's other input is a gate
                call.starts.append(edge(leaf))
                call.given.append(x.detach().clone())
            return clone

        changed = tuple(map(apart, args)), {name: apart(x) for name, x in kwargs.items()}
        calls.setdefault(ends, []).append(call)
        return changed

    def after(_: nn.Module, args: tuple, output: Any, ends: Ends) -> None:
        stream = stream_out(output)
        if stream is not None and calls.get(ends) and stream.requires_grad:
            calls[ends][-1].end, calls[ends][-1].made = edge(stream), stream.detach().clone()

    def layer_begins(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        stream = stream_in(args, kwargs)
        if stream is not None and stream.requires_grad and not ends_of_stream:
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
    norms = {(path, path) for path in parts.norms}
    everything: list[Ends] = [*parts.attentions, *parts.mlps, *norms]
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


def _afresh(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A leaf with the numbers of a tensor, and a copy of the leaf, which may be changed in place."""
    leaf = x.detach().requires_grad_(True)
    return leaf, leaf.clone()


def _between(call: _Call) -> Way:
    return Way(False) if call.end is None else way(call.end, call.starts)


def _same_numbers(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are equal; up to rounding, because torch takes another kernel for a mask with a gradient."""
    return torch.equal(a, b) or same(b, a, 64 * torch.finfo(a.dtype).eps)


def _misses(call: _Call, tolerance: float) -> bool:
    """Whether a part's output lacks some of what its input makes of it, though all that is left is linear."""
    found = _between(call)
    return not found.depends or (not found.bad and not _incompleteness(call, found.leaves) <= tolerance)


def _judge(parts: FrozenParts, plain: _Run, run: _Run, tolerance: float) -> FrozenProof:
    """What the runs show of each kind."""
    reasons: dict[str, str] = {}

    def refuse(kind: str, why: str) -> None:
        reasons.setdefault(kind, why)

    if len(plain.outputs) != len(run.outputs) or not all(
        map(_same_numbers, plain.outputs, run.outputs)
    ):
        return FrozenProof(parts, dict.fromkeys(FROZEN, "the forward pass does not give the same numbers with it"))
    for _, exit_, kind in parts.mixers:
        for name in ("patterns", "gates"):
            refuse(name, f"{generic_path(exit_)} is a {kind} mixer, which has no pattern and no single gate to hold")
    largest, known = 0.0, set[Node]()
    own = {"norms": [(path, path) for path in parts.norms], "patterns": parts.attentions, "gates": parts.mlps}
    for name, ends in ((name, ends) for name, all_ends in own.items() for ends in all_ends):
        for call in run.calls.get(ends, []):
            where = generic_path(ends[0] if ends[0] == ends[1] else f"{ends[0]} → {ends[1]}")
            found = _between(call)
            known.update(found.nodes)
            if not found.depends:
                lent = call.end is not None and run.stream is not None and way(call.end, [run.stream[0]]).depends
                if lent and name == "patterns":  # values of an earlier layer; queries alone are its own
                    continue
                refuse(name, f"with it, the output of {where} does not depend on its input")
                continue
            for operation in found.bad:
                for kind in _kinds_of(operation, name):
                    refuse(kind, f"{where} is not linear with it ({operation})")
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
        for operation in way(run.stream[1], [run.stream[0]], known).bad:
            for kind in _kinds_of(operation, None if parts.mixers else ""):
                refuse(kind, f"{operation} stands on the way from the first layer to the last")
    return FrozenProof(parts, {kind: reasons[kind] for kind in FROZEN if kind in reasons}, largest)


_OF_NORMS = ("Rsqrt", "NativeLayerNorm", "FusedRmsNorm", "LinalgVectorNorm", "Norm", "Std", "Var", "NativeGroupNorm")
_OF_PATTERNS = ("Softmax", "ScaledDotProduct", "Bmm", "Baddbmm", "FlashAttn", "FlexAttention")
_OF_GATES = (
    *("Silu", "Gelu", "Relu", "Sigmoid", "Tanh", "Softplus", "Mish", "Hardswish", "Elu", "LeakyRelu", "Glu", "Clamp"),
)


def _kinds_of(operation: str, part: str | None) -> tuple[str, ...]:
    """Which kinds an operation that is not linear speaks against.

    Args:
        operation: Autograd's name of it.
        part: The kind of the part that it stands in; "" outside of parts; None where mixers stand that are refused.
    """
    name = operation.split("Backward")[0]
    for kind, names in (("norms", _OF_NORMS), ("patterns", _OF_PATTERNS), ("gates", _OF_GATES)):
        if name.startswith(names) and not (kind == "patterns" and part == "gates"):
            return (kind,)
    if part is None:
        return ()
    return ("patterns", "gates") if part in ("patterns", "") else (part,)


def _incompleteness(call: _Call, biases: tuple[torch.Tensor, ...]) -> float:
    """How far a part's output is from its Jacobian times its input plus its biases' share, along one direction."""
    assert call.end is not None and call.made is not None
    made = call.made.double()
    weight = 0.5 + torch.rand(made.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(made.device)
    along = (made * weight).to(call.made.dtype)
    inputs: list[Any] = [*call.starts, *biases]
    handles = [e.node.register_prehook(lambda slopes: tuple(x if x is None else x * 0 for x in slopes)) for e in call.starts]
    slopes = torch.autograd.grad([call.end], inputs, [along], retain_graph=True, allow_unused=True)  # type: ignore[arg-type]
    for handle in handles:  # a bias that is also used before the part counts in the part alone
        handle.remove()
    terms = zip(slopes, [*call.given, *biases], strict=True)
    total = sum(float((slope.double() * x.detach().double()).sum()) for slope, x in terms if slope is not None)
    expected = float((along.double() * made).sum())
    return abs(total - expected) / max(abs(expected), 1e-30)
