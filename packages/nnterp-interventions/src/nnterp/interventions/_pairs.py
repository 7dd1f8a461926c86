"""Pairs of a clean and a corrupted prompt, and which of the two runs is patched from which."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from nnterp.inputs import Row, encode

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer

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


def encode_pairs(
    model: StandardizedTransformer, clean: Any, corrupted: Any, direction: Direction, images: bool = False
) -> Pairs:
    """Clean and corrupted prompts as pairs; with `images`, the caller runs images.

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
    return pairs
