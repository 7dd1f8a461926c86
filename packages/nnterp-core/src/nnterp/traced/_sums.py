"""Values that are sums of what modules return, each times a factor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from nnterp.errors import ShapeError
from nnterp.record import Record
from nnterp.traced._places import Site

if TYPE_CHECKING:
    from nnterp.traced._running import Running


class Sum(Record):
    """Multiples of module outputs, added up; writing changes the last of them so that the sum becomes what is written.

    Attributes:
        terms: (module path, factor: a number or one per channel) in forward order.
        constant: Added to the sum: one number per channel, or None.
    """

    kind: type[Site] = Site  # what its terms are read with

    def __init__(
        self, terms: tuple[tuple[str, float | torch.Tensor], ...], constant: torch.Tensor | None = None
    ) -> None:
        self.terms, self.constant = terms, constant

    def __eq__(self, other: object) -> bool:  # factors may be tensors
        return self is other

    def __hash__(self) -> int:
        return id(self)

    def read(self, model: Running, label: str) -> torch.Tensor:
        """The sum; the module's own tensor where it is one module's output as it is."""
        return self.total([self.kind(path, "output").read(model, label) for path, _ in self.terms])

    def total(self, given: Sequence[torch.Tensor]) -> torch.Tensor:
        """The sum of what the terms' modules returned."""
        sum_ = added([scaled(tensor, factor) for tensor, (_, factor) in zip(given, self.terms, strict=True)])
        return sum_ if self.constant is None else sum_ + self.constant.to(sum_)

    def write(self, model: Running, tensor: torch.Tensor, label: str) -> None:
        """Make the last term what the others leave, which are read on the way; ShapeError if the size is another."""
        *others, (path, factor) = self.terms
        rest = [scaled(self.kind(p, "output").read(model, label), f) for p, f in others]
        last = self.kind(path, "output")
        current = last.read(model, label)
        if tensor.numel() != current.numel():
            raise ShapeError(
                f"{label} has shape {list(current.shape)}; a tensor of shape {list(tensor.shape)} cannot replace it."
            )
        left = tensor.reshape(current.shape).to(current.device)
        if rest:
            left = left - added(rest).to(left)
        if self.constant is not None:
            left = left - self.constant.to(left)
        if isinstance(factor, torch.Tensor):
            left = left / factor.to(left)
        elif factor != 1.0:
            left = left / factor
        last.write(model, left.to(dtype=current.dtype), label)

    def __str__(self) -> str:
        words = " + ".join(f"{_factor(factor)}{path}.output" for path, factor in self.terms)
        return words if self.constant is None else f"{words} + one constant per channel"


def _factor(factor: float | torch.Tensor) -> str:
    if isinstance(factor, torch.Tensor):
        return "one factor per channel × "
    return "" if factor == 1.0 else f"{factor:g} × "


def added(terms: list[torch.Tensor]) -> torch.Tensor:
    """The sum; one tensor as it is."""
    total = terms[0]
    for term in terms[1:]:
        total = total + term.to(total.device)
    return total


def scaled(tensor: torch.Tensor, factor: float | torch.Tensor) -> torch.Tensor:
    """A multiple of a tensor in its own dtype; the tensor itself for a factor of 1."""
    if isinstance(factor, torch.Tensor):
        return tensor * factor.to(tensor)
    return tensor if factor == 1.0 else tensor * factor
