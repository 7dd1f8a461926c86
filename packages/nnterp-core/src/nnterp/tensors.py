"""Questions about tensors that every room asks in the same way: which one is the stream, and are two the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def stream_in(args: tuple, kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    """The stream among a module's arguments: the first floating tensor, by position, then `hidden_states`, then any
    keyword."""
    for value in (*args, *(kwargs[name] for name in ("hidden_states", *kwargs) if name in kwargs)):
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value
    return None


def stream_out(output: Any) -> torch.Tensor | None:
    """The stream in what a module returned: the tensor itself, or the first entry of a tuple or list."""
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    return output if isinstance(output, torch.Tensor) else None


def copied(value: Any) -> Any:
    """A detached copy of a tensor, because models edit in place; tuples and lists are copied entry by entry."""
    if isinstance(value, torch.Tensor):
        return value.detach() if value.device.type == "meta" else value.detach().clone()
    if type(value) in (tuple, list):
        return type(value)(copied(item) for item in value)
    return value


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest error over positions, relative to the norm of what is expected at that position.

    Returns:
        Infinity where the shapes differ or the error is not a number.
    """
    if actual.shape != expected.shape:
        return float("inf")
    error = error_at_positions(actual, expected).max().item()
    return error if error == error else float("inf")


def error_at_positions(actual: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """The error at each position, relative to the norm of what is expected there, `[...]` of `[..., width]`; float64.

    Norms below a thousandth of the largest count as that.
    """
    actual, expected = actual.double(), expected.double()
    norm = expected.norm(dim=-1)
    floor = norm.max().clamp(min=1e-30) * 1e-3
    return (actual - expected).norm(dim=-1) / norm.clamp(min=float(floor))


def same(a: Any, b: Any, tolerance: float) -> bool:
    """Whether two tensors of one shape hold the same numbers, up to `tolerance` times the largest of them."""
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor) or a.shape != b.shape:
        return False
    if not a.numel():
        return True
    if not a.is_floating_point() or not b.is_floating_point():
        return torch.equal(a, b)
    if a.dtype == b.dtype and torch.equal(a, b):
        return True
    largest = b.abs().max()
    if torch.isfinite(largest):  # most tensors that differ already differ in a sample of 64 entries
        stride = max(1, b.numel() // 64)
        apart = (a.reshape(-1)[::stride] - b.reshape(-1)[::stride]).abs().max()
        if not apart <= 10 * tolerance * largest.clamp(min=1e-30):
            return False
    a, b = a.double(), b.double()
    finite = torch.isfinite(b)
    if not torch.equal(torch.isfinite(a), finite):
        return False
    a, b = a[finite], b[finite]
    return not a.numel() or bool((a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1e-30))


def is_multiple(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> bool:
    """Whether `a` is `b` times one number other than 0."""
    if a.numel() != b.numel() or a.shape[-1] != b.shape[-1]:
        return False
    a, b = a.double().reshape(-1, a.shape[-1]), b.double().reshape(-1, b.shape[-1])
    scale = (a * b).sum() / b.square().sum().clamp(min=1e-30)
    return bool(scale.abs() > 1e-12) and relative_error(a, b * scale) <= tolerance
