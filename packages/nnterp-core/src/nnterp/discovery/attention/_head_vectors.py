"""Read a recorded tensor as one vector per position and head."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from nnterp.discovery._probe import ROWS
from nnterp.discovery.attention._evidence import Candidate
from nnterp.traced import Layout, Place, over


@dataclass(frozen=True)
class HeadVectors:
    """A candidate read in one layout.

    Attributes:
        candidate: The tensor as the model stores it.
        layout: Its axes.
        vectors: The same numbers as `[batch, seq, heads, dim]`.
    """

    candidate: Candidate
    layout: Layout
    vectors: torch.Tensor

    @property
    def both(self) -> bool:
        """True if the tensor is there when the model computes attention in its own way, too."""
        return self.candidate.both

    @property
    def place(self) -> Place:
        """Where the vectors are served, as `[batch, seq, heads, dim]`."""
        return over(self.candidate.place, self.layout)


def head_vectors(candidate: Candidate, length: int, heads: int) -> Iterator[HeadVectors]:
    """The layouts in which a tensor can hold one vector for each of `length` positions and each head.

    The tensor may hold fewer heads than `heads`, if their number divides it (grouped keys and values).
    """
    for layout in _fitting(tuple(candidate.tensor.shape), length, heads):
        vectors = layout.show(candidate.tensor)
        if heads % vectors.shape[2] == 0:
            yield HeadVectors(candidate, layout, vectors)


def _fitting(shape: tuple[int, ...], length: int, heads: int) -> Iterator[Layout]:
    """The layouts in which a tensor of this shape has the probe's rows and `length` positions."""
    if len(shape) == 4 and shape[0] == ROWS:
        for name, seq in (
            ("[batch, heads, seq, dim]", 2),
            ("[batch, seq, heads, dim]", 1),
            ("[batch, heads, dim, seq]", 3),
        ):
            if shape[seq] == length:
                yield Layout(name)
    if len(shape) == 4 and shape[:2] == (length, ROWS):
        yield Layout("[seq, batch, heads, dim]")
    if len(shape) == 3 and shape[0] == ROWS * heads:
        for name, seq in (("[batch × heads, seq, dim]", 1), ("[batch × heads, dim, seq]", 2)):
            if shape[seq] == length:
                yield Layout(name, heads)


def repeated(vectors: torch.Tensor, heads: int) -> torch.Tensor:
    """Keys or values with each head repeated until there are `heads`, `[batch, seq, heads, dim]`."""
    return vectors.repeat_interleave(heads // vectors.shape[2], dim=2)


def averaged(probs: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The values averaged under the probabilities: `[batch, query, heads, dim]`, float64."""
    return torch.einsum("bhqk,bkhd->bqhd", probs.double(), repeated(values, probs.shape[1]).double())
