"""The linear modules of a part, and the projection that ends it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from nnterp.anatomy import Part
from nnterp.discovery._recording import Recording
from nnterp.tensors import same


@dataclass(frozen=True)
class Linear:
    """One linear module as it ran: its path, what it was given and what it returned."""

    path: str
    given: torch.Tensor
    made: torch.Tensor


def linears(root: nn.Module, part: Part, recording: Recording) -> list[Linear]:
    """The linear modules of a part, in the order in which they ended."""
    tops = (part.path or part.entry, part.exit)
    found: list[tuple[int, Linear]] = []
    for path, calls in recording.calls.items():
        if not any(path == top or path.startswith(f"{top}.") for top in tops):
            continue
        given, made = calls[0].stream_in, calls[0].stream_out
        if given is not None and made is not None and is_linear(root.get_submodule(path)):
            found.append((calls[0].ended, Linear(path, given, made)))
    return [linear for _, linear in sorted(found, key=lambda entry: entry[0])]


def is_linear(module: nn.Module) -> bool:
    """Whether a module is one matrix: torch's Linear, GPT-2's Conv1D, or a quantised or adapted one."""
    if isinstance(module, (nn.Embedding, nn.ModuleList)) or "norm" in type(module).__name__.lower():
        return False
    weight = getattr(module, "weight", None)
    matrix = isinstance(weight, torch.Tensor) and weight.dim() == 2
    return matrix or ("Linear" in type(module).__name__ and not list(module.children()))


def arguments_of(part: Part, recording: Recording) -> list[torch.Tensor]:
    """All floating tensors that a part was called with; empty if it did not run."""
    call = recording.call(part.path or part.entry)
    return [] if call is None else call.floats_in


def feeding(candidates: list[Linear], path: str, tolerance: float) -> str | None:
    """Path of the last linear module whose output is the input of the one at `path`; None if there is none."""
    entering = next((linear.given for linear in candidates if linear.path == path), None)
    for other in reversed(candidates):
        if entering is None or other.path == path:
            continue
        alike = other.made.numel() == entering.numel() and other.made.shape[:2] == entering.shape[:2]
        if alike and same(other.made.flatten(2), entering.flatten(2), tolerance):
            return other.path
    return None


def ending(
    candidates: list[Linear],
    result: torch.Tensor,
    given: list[torch.Tensor],
    tolerance: float,
    multiples: bool = False,
) -> Linear | None:
    """The projection that ends a part.

    It is the last linear module whose output is what the part returns, either as it is or added to something the part
    was given (BLOOM's parts add the residual themselves).

    Args:
        candidates: The part's linear modules, in the order they ran.
        result: What the part returns.
        given: What it was called with.
        tolerance: The largest relative error that counts as equal.
        multiples: Whether the output may be multiplied by one number first (Falcon-H1).

    Returns:
        The projection; None if no linear module fits.
    """
    for linear in reversed(candidates):
        if linear.made.numel() != result.numel():
            continue
        made = linear.made.reshape(result.shape)
        if same(made, result, tolerance):
            return linear
        if any(same(made + residual, result, tolerance) for residual in given if residual.shape == made.shape):
            return linear
        if multiples:
            factor = (made.double() * result).sum() / made.double().square().sum().clamp(min=1e-30)
            if factor.abs() > 1e-6 and same(made.double() * factor, result.double(), tolerance):
                return linear
    return None
