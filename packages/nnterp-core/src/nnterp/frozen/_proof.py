"""Prove on a short probe that what is to be held still is: the same numbers, and a backward pass that is linear.

For every part, two things are shown of its backward pass. Autograd's graph from its output to its input holds only
operations that are linear, so no gradient gets past what is held still. And its output is its Jacobian times its input,
plus its biases' share, so nothing is held still that should not be.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import Node

from nnterp.anatomy import Anatomy
from nnterp.discovery import quiet, rounding_of, silent_weights, sounding
from nnterp.frozen._audit import Way, way
from nnterp.frozen._kinds import FROZEN
from nnterp.frozen._parts import FrozenParts, find_parts
from nnterp.frozen._runs import Call, Run
from nnterp.tensors import same
from nnterp.wording import generic_path

_OF_NORMS = ("Rsqrt", "NativeLayerNorm", "FusedRmsNorm", "LinalgVectorNorm", "Norm", "Std", "Var", "NativeGroupNorm")
_MAYBE_OF_NORMS = ("Pow", "Sqrt", "Div", "Reciprocal")  # outside of feed-forwards
_OF_PATTERNS = ("Softmax", "SafeSoftmax", "ScaledDotProduct", "Bmm", "Baddbmm", "FlashAttn", "FlexAttention")
_OF_GATES = (
    *("Silu", "Gelu", "Relu", "Sigmoid", "LogSigmoid", "Tanh", "Softplus", "Mish", "Hardswish", "Elu", "LeakyRelu"),
    *("Glu", "Clamp"),
)


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


def prove(module: nn.Module, anatomy: Anatomy) -> FrozenProof:
    """Try every kind of `FROZEN` on a HuggingFace module."""
    tolerance = max(1e-3, 4 * rounding_of(module))
    with _on_probe(module):
        parts = find_parts(module, anatomy)
        try:
            plain = Run(module, anatomy, parts, ())
            parts, run = _gates_and_slopes(module, anatomy, parts)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            why = f"the model could not be run with it on a probe ({type(error).__name__}: {error!s:.200})"
            return FrozenProof(parts, dict.fromkeys(FROZEN, why))
        if len(plain.outputs) != len(run.outputs) or not all(map(_same_numbers, plain.outputs, run.outputs)):
            return FrozenProof(parts, dict.fromkeys(FROZEN, "the forward pass does not give the same numbers with it"))
        return _judge(parts, run, tolerance)


@contextlib.contextmanager
def _on_probe(module: nn.Module) -> Iterator[None]:
    """Only biases require a gradient, weights that are all zero are replaced, and the module is left as it was."""
    kept = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    try:
        with torch.inference_mode(False), quiet(module), sounding(module, silent_weights(module)), torch.enable_grad():
            for name, parameter in module.named_parameters():
                parameter.requires_grad_(parameter.is_floating_point() and name.endswith("bias"))
            yield
    finally:
        for parameter, required in kept:
            parameter.requires_grad_(required)


def _gates_and_slopes(module: nn.Module, anatomy: Anatomy, parts: FrozenParts) -> tuple[FrozenParts, Run]:
    """Find out which feed-forwards have no gate, and run the probe with everything held still.

    First, the slope of every activation is held. A gated feed-forward is then still a product of two branches, so its
    way is not linear: of those, the activation's result is held instead.
    """
    parts = dataclasses.replace(parts, plain=frozenset(parts.mlps))
    run = Run(module, anatomy, parts, FROZEN)
    ways = {ends: [_between(call) for call in run.calls.get(ends, [])] for ends in parts.mlps}
    plain = frozenset(ends for ends, found in ways.items() if all(w.depends and not w.bad for w in found))
    if plain == parts.plain:
        return parts, run
    parts = dataclasses.replace(parts, plain=plain)
    return parts, Run(module, anatomy, parts, FROZEN)


def _same_numbers(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are equal; up to rounding, because torch takes another kernel for a mask with a gradient."""
    return torch.equal(a, b) or same(b, a, 64 * torch.finfo(a.dtype).eps)


def _judge(parts: FrozenParts, run: Run, tolerance: float) -> FrozenProof:
    """What a run with everything held still shows of each kind."""
    reasons: dict[str, str] = {}
    largest, known = 0.0, set[Node]()
    for _, exit_, kind in parts.mixers:
        for name in ("patterns", "gates"):
            why = f"{generic_path(exit_)} is a {kind} mixer, which has no pattern and no single gate to hold"
            reasons.setdefault(name, why)
    own = {"norms": [(path, path) for path in parts.norms], "patterns": parts.attentions, "gates": parts.mlps}
    for name, ends in ((name, ends) for name, all_ends in own.items() for ends in all_ends):
        where = generic_path(ends[0] if ends[0] == ends[1] else f"{ends[0]} → {ends[1]}")
        for call in run.calls.get(ends, []):
            found = _between(call)
            known.update(found.nodes)
            for operation in found.bad:
                for kind in _kinds_of(operation, name):
                    reasons.setdefault(kind, f"{where} is not linear with it ({operation})")
            if not found.depends:
                if name != "patterns" or not _is_lent(call, run):
                    reasons.setdefault(name, f"with it, the output of {where} does not depend on its input")
            elif not found.bad:
                largest = max(largest, error := _incompleteness(call, found.leaves))
                if not error <= tolerance:
                    reasons.setdefault(
                        name,
                        f"the output of {where} is not its Jacobian times its input, plus its biases' share, with it "
                        f"(relative error {error:.1e}, tolerance {tolerance:.0e})",
                    )
    if len(run.stream) == 2:
        for operation in way(run.stream[1], run.stream[:1], known).bad:
            for kind in _kinds_of(operation, None if parts.mixers else ""):
                reasons.setdefault(kind, f"{operation} stands on the way from the first layer to the last")
    return FrozenProof(parts, {kind: reasons[kind] for kind in FROZEN if kind in reasons}, largest)


def _between(call: Call) -> Way:
    return Way(False) if call.end is None else way(call.end, call.starts)


def _is_lent(call: Call, run: Run) -> bool:
    """Whether an attention's values come from an earlier layer, so that its own input makes its queries alone."""
    return call.end is not None and bool(run.stream) and way(call.end, run.stream[:1]).depends


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
    roots = ("norms",) if name.startswith(_MAYBE_OF_NORMS) else ()
    if part is None:
        return roots if not name.startswith("Div") else ()
    if part in ("patterns", ""):
        return ("patterns", "gates", *roots)
    return (part,)


def _incompleteness(call: Call, biases: tuple[torch.Tensor, ...]) -> float:
    """How far a part's output is from its Jacobian times its input plus its biases' share, along one direction."""
    assert call.end is not None
    assert call.made is not None
    made = call.made.double()
    weight = 0.5 + torch.rand(made.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    along = (made * weight.to(made.device)).to(call.made.dtype)
    inputs: list[Any] = [*call.starts, *biases]
    # A bias that is also used before the part counts in the part alone.
    stops = [
        e.node.register_prehook(lambda slopes: tuple(None if x is None else x * 0 for x in slopes)) for e in call.starts
    ]
    slopes = torch.autograd.grad([call.end], inputs, [along], retain_graph=True, allow_unused=True)  # type: ignore[arg-type]
    for stop in stops:
        stop.remove()
    terms = zip(slopes, [*call.given, *biases], strict=True)
    total = sum(float((slope.double() * x.detach().double()).sum()) for slope, x in terms if slope is not None)
    expected = float((along.double() * made).sum())
    return abs(total - expected) / max(abs(expected), 1e-30)
