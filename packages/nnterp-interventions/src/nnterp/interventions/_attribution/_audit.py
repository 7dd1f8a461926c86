"""The audit of an attribution: some of its estimates computed exactly, and how far both agree."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from nnterp.interventions._columns import Entry, column

AUDIT = "audit"  # where `Result.about` keeps the record
FLOOR = 1e-3  # effects below this part of the largest exact one have no sign


@dataclass(frozen=True)
class Audit:
    """Estimates of an attribution beside exact effects, measured in runs that make the change.

    Attributes:
        cells: One entry for each that was computed: its labels ("layer", ...), "estimate", "exact", and "chosen": "top"
            for those with the largest estimates, "random" for a random sample of the others. Top ones first.
        seed: Of the random sample.
        signed: Whether estimates and exact effects have signs; False if both are absolute values.

    Example:
        metric = logit_difference(" Paris", " Rome")
        found = attribution_patching(model, "The capital of France is", "The capital of Italy is", metric, audit=8)
        found.audit.rank_correlation, found.audit.sign_errors, found.audit.worst(2)
    """

    cells: tuple[Mapping[str, Any], ...]
    seed: int
    signed: bool = True

    def __len__(self) -> int:
        return len(self.cells)

    @property
    def estimates(self) -> torch.Tensor:
        """The estimated effects, float64 `[cells]`, on the CPU."""
        return torch.tensor([cell["estimate"] for cell in self.cells], dtype=torch.float64)

    @property
    def exact(self) -> torch.Tensor:
        """The exact effects, float64 `[cells]`, on the CPU."""
        return torch.tensor([cell["exact"] for cell in self.cells], dtype=torch.float64)

    @property
    def rank_correlation(self) -> float:
        """Spearman's rank correlation of estimates and exact effects; NaN if either are all equal."""
        return spearman(self.estimates, self.exact)

    def among(self, chosen: str) -> Audit:
        """The audit of the "top" or of the "random" cells alone."""
        return Audit(tuple(cell for cell in self.cells if cell["chosen"] == chosen), self.seed, self.signed)

    @property
    def sign_errors(self) -> int:
        """How many estimates have the wrong sign. Effects below a thousandth of the largest exact one do not count.

        Always 0 where estimates and effects are absolute values.
        """
        estimates, exact = self.estimates, self.exact
        least = FLOOR * exact.abs().max() if len(self) else 0.0
        return int(((estimates * exact < 0) & (exact.abs() > least) & (estimates.abs() > least)).sum())

    def worst(self, k: int = 5) -> list[dict[str, Any]]:
        """Find the cells whose estimates are furthest from the exact effects.

        Returns:
            The `k` worst cells, worst first, each with its "error": estimate minus exact effect.
        """
        missed: list[dict[str, Any]] = [
            Entry({**cell, "error": cell["estimate"] - cell["exact"]}) for cell in self.cells
        ]
        return sorted(missed, key=lambda cell: -abs(cell["error"]))[:k]

    def __str__(self) -> str:
        if not self.cells:
            return "audited: there was nothing to audit"
        furthest = self.worst(1)[0]
        where = ", ".join(
            f"{axis} {furthest[axis]}" for axis in furthest if axis not in ("estimate", "exact", "chosen", "error")
        )
        errors = (
            f"{self.sign_errors} sign error{'' if self.sign_errors == 1 else 's'}" if self.signed else "without signs"
        )
        return (
            f"audited: {len(self)} exact, rank correlation {self.rank_correlation:.2f}, {errors}, worst miss at {where}"
            f": estimated {furthest['estimate']:.3g}, exact {furthest['exact']:.3g}"
        )

    def record(self) -> dict[str, Any]:
        """Write the audit as JSON can hold it.

        Returns:
            A dict with the "cells", the "seed", and "signed" where it is False; `Audit.of` reads it from the record of
            a result.
        """
        return {
            "cells": [dict(cell) for cell in self.cells],
            "seed": self.seed,
            **({} if self.signed else {"signed": False}),
        }

    @staticmethod
    def of(about: Mapping[str, Any]) -> Audit | None:
        """Read the audit in the record of a result; returns None if it was not audited."""
        found = about.get(AUDIT)
        return (
            None
            if found is None
            else Audit(tuple(map(_named, found["cells"])), found["seed"], found.get("signed", True))
        )


def _named(cell: Mapping[str, Any]) -> Entry:
    """A cell that was written to a file, its labels by column."""
    return Entry((column(name), entry) for name, entry in cell.items())


def audited(
    estimates: torch.Tensor,
    exact: Callable[[list[int]], torch.Tensor],
    labels: Callable[[int], Mapping[str, Any]],
    count: int,
    seed: int = 0,
    signed: bool = True,
) -> Audit:
    """Compute some estimated effects exactly: those of the largest magnitude, and a random sample of the others.

    Args:
        estimates: `[cells]`; those that are NaN do not exist.
        exact: From indices of cells to their exact effects, `[n]`.
        labels: From the index of a cell to its labels by column, which JSON can hold.
        count: How many: half of them (one more if it is odd) are those of the largest magnitude.
        seed: Of the random sample.
        signed: Whether both have signs.
    """
    top, random = chosen_cells(estimates, count, seed)
    found = exact([*top, *random]).double().tolist() if top else []
    cells = [
        Entry(labels(i), estimate=float(estimates[i]), exact=effect, chosen="top" if k < len(top) else "random")
        for k, (i, effect) in enumerate(zip([*top, *random], found, strict=True))
    ]
    return Audit(tuple(cells), seed, signed)


def chosen_cells(estimates: torch.Tensor, count: int, seed: int) -> tuple[list[int], list[int]]:
    """The cells to audit: those of the largest estimates, largest first, and a random sample of the others."""
    there = (~estimates.isnan()).nonzero()[:, 0]
    order = there[estimates[there].abs().argsort(descending=True, stable=True)]
    count = min(count, len(order))
    top, rest = order[: (count + 1) // 2], order[(count + 1) // 2 :]
    picked = torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))[: count // 2]
    return top.tolist(), rest[picked].sort().values.tolist()


def spearman(a: torch.Tensor, b: torch.Tensor) -> float:
    """Spearman's rank correlation of two vectors, ties sharing their mean rank; NaN if either has one value only."""
    if len(a) < 2:
        return float("nan")
    x, y = (_ranks(values) for values in (a.double(), b.double()))
    x, y = x - x.mean(), y - y.mean()
    scale = (x.square().sum() * y.square().sum()).sqrt()
    return float((x * y).sum() / scale) if scale > 0 else float("nan")


def _ranks(values: torch.Tensor) -> torch.Tensor:
    _, place, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts.double() - 1) / 2)[place]
