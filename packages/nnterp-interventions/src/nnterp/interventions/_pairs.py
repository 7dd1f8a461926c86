"""Pairs of a clean and a corrupted prompt, and which of the two runs is patched from which."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch

from nnterp.inputs import Row, encode
from nnterp.warn import warn

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer

_ROUNDING = 1e-6  # float32 has 1.2e-7; the same prompt in another batch differs by a few of them

Direction: TypeAlias = Literal["denoising", "noising"]


@dataclass(frozen=True)
class Pairs:
    """Prompts that go in pairs.

    Attributes:
        clean, corrupted: The prompts, in the order of the pairs.
        direction: "denoising" patches from the clean run into the corrupted one, "noising" the reverse.
    """

    clean: list[Row]
    corrupted: list[Row]
    direction: Direction

    def __len__(self) -> int:
        return len(self.clean)

    @property
    def denoising(self) -> bool:
        """Whether the corrupted run is patched into."""
        return self.direction == "denoising"

    @property
    def into(self) -> list[Row]:
        """The prompts whose runs are patched into."""
        return self.corrupted if self.denoising else self.clean

    @property
    def source(self) -> list[Row]:
        """The prompts whose runs are patched from."""
        return self.clean if self.denoising else self.corrupted


def gap_between(source: torch.Tensor, into: torch.Tensor) -> torch.Tensor:
    """Return `source - into`; NaN where they are equal up to rounding, because a score divided by that says nothing.

    Args:
        source: The metric of the runs patched from, any shape.
        into: That of the runs patched into, of the same shape.

    Returns:
        Of their shape, dtype and device. Equal up to rounding: the difference is at most 1e-6 of the larger of the two.
    """
    gap = source - into
    return gap.where(gap.abs() > _ROUNDING * torch.maximum(source.abs(), into.abs()), torch.nan)


def encode_pairs(
    model: StandardizedTransformer, clean: Any, corrupted: Any, direction: Direction, images: bool = False
) -> Pairs:
    """Clean and corrupted prompts as pairs; with `images`, the caller runs images.

    Warns of pairs of two equal prompts: text was replaced that is not in the prompt, for example.

    Raises:
        ValueError: There are not equally many, or the direction is none of the two.
    """
    if direction not in ("denoising", "noising"):
        raise ValueError(f'direction is "denoising" or "noising", not {direction!r}.')
    pairs = Pairs(encode(model, clean, images), encode(model, corrupted, images), direction)
    if len(pairs.clean) != len(pairs.corrupted):
        raise ValueError(
            f"{len(pairs.clean)} clean prompts and {len(pairs.corrupted)} corrupted ones; they go in pairs."
        )
    both = zip(pairs.clean, pairs.corrupted, strict=True)
    if equal := [str(i) for i, (own, other) in enumerate(both) if own.identity == other.identity]:
        warn(
            f"The clean and the corrupted prompt are the same in {len(equal)} of {len(pairs)} pairs (index "
            f"{', '.join(equal[:8])}{', ...' if len(equal) > 8 else ''}): patching between them changes nothing."
        )
    return pairs
