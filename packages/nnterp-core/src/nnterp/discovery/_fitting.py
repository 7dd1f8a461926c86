"""Least squares: the multiples of some streams that add up to another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch

from nnterp.tensors import relative_error

Scale: TypeAlias = float | torch.Tensor  # one number, or one per channel


@dataclass(frozen=True)
class Fit:
    """Coefficients of a sum.

    Attributes:
        error: Relative error of the sum, the worst over positions; infinite if there are too few positions to tell.
        scales: The coefficient of each part.
        constant: What is added beside the parts, `[hidden]`; None for nothing.
    """

    error: float
    scales: list[Scale]
    constant: torch.Tensor | None = None

    @property
    def whole(self) -> bool:
        """Whether every part has a coefficient other than 0. A part that already is the sum leaves 0 for the others."""
        return all(abs(s) > 1e-6 if isinstance(s, float) else bool(s.abs().max() > 1e-6) for s in self.scales)


def fit(target: torch.Tensor, parts: list[torch.Tensor], per_channel: bool) -> Fit:
    """Find the coefficients with which parts add up to a target; those close to a whole number are rounded to it.

    Args:
        target: `[..., hidden]`.
        parts: Tensors of the same shape.
        per_channel: Fit one coefficient for each channel and a constant for each channel, instead of one coefficient
            for all.
    """
    width = target.shape[-1]
    goal = target.double().reshape(-1, width)
    columns = torch.stack([p.double().reshape(-1, width) for p in parts], dim=-1)  # [positions, channels, parts]
    return _per_channel(target, goal, columns) if per_channel else _one_each(target, goal, columns)


def _one_each(target: torch.Tensor, goal: torch.Tensor, columns: torch.Tensor) -> Fit:
    """One coefficient for each part."""
    flat = columns.reshape(-1, columns.shape[-1])
    found = torch.linalg.lstsq(flat, goal.reshape(-1, 1)).solution[:, 0]
    # The structure is reused on other inputs: a coefficient of 1 must not carry this fit's rounding error along.
    rounded = torch.where((found - found.round()).abs() < 1e-3, found.round(), found)
    fits = [
        Fit(relative_error((columns @ c).reshape(target.shape), target), [float(value) for value in c])
        for c in (rounded, found)
    ]
    return fits[0] if fits[0].error <= 2 * fits[1].error + 1e-7 else fits[1]


def _per_channel(target: torch.Tensor, goal: torch.Tensor, columns: torch.Tensor) -> Fit:
    """One coefficient for each part and channel, and a constant for each channel."""
    parts = columns.shape[-1]
    if goal.shape[0] < 2 * (parts + 1):
        return Fit(float("inf"), [])
    ones = torch.ones_like(columns[..., :1])
    rows = torch.cat([columns, ones], dim=-1).transpose(0, 1)  # [channels, positions, parts + 1]
    solved = torch.linalg.lstsq(rows, goal.T.unsqueeze(-1)).solution[..., 0]  # [channels, parts + 1]
    error = relative_error(torch.einsum("cpk,ck->pc", rows, solved).reshape(target.shape), target)
    scales: list[Scale] = []
    for k in range(parts):
        column = solved[:, k]
        one = bool((column - column.mean().round()).abs().max() < 1e-3)
        scales.append(float(column.mean().round()) if one else column)
    constant = solved[:, -1]
    small = constant.abs().max() < 1e-3 * goal.abs().mean()
    return Fit(error, scales, None if small else constant)
