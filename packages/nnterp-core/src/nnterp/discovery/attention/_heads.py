"""Find what each head returns: the input of W_O, or the averaged values where no projection ends attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nnterp.discovery.attention._evidence import Evidence
from nnterp.discovery.attention._head_vectors import head_vectors
from nnterp.tensors import same
from nnterp.traced import Layout, Place, Site, over


@dataclass(frozen=True)
class Heads:
    """Where the outputs of the heads are served.

    Attributes:
        outputs: Where each head's output is served, or why it is not.
        contributions: Where what W_O makes of each head is read from, or why it is not.
        in_out: Heads in W_O's input, if that is where they are served.
    """

    outputs: Place | str
    contributions: Place | str
    in_out: int | None = None


def split_heads(place: Place, heads: int, grouped: bool = False) -> Place:
    """`[batch, seq, heads × dim]` shown as `[batch, seq, heads, dim]`; `grouped` if the last axis is cut in groups."""
    return over(place, Layout("[batch, seq, groups, ...]" if grouped else "[batch, seq, heads × dim]", heads))


def find_heads(
    evidence: Evidence, out: tuple[str, torch.Tensor] | None, heads: int | None, product: torch.Tensor | None
) -> Heads:
    """Find where the outputs of the heads are served.

    Args:
        evidence: What was recorded.
        out: Path of W_O and what it was given, if one projection ends attention.
        heads: Query heads, where their number is known.
        product: The probabilities times the values, `[batch, query, heads, dim]`, where they were found.
    """
    if out is None:
        reason = "attention does not end in one projection (W_O) whose input holds the heads side by side"
        place = None if product is None else _where_returned(evidence, product)
        return Heads(reason if place is None else place, reason)
    path, width = out[0], out[1].shape[-1]
    if not heads or width % heads:
        reason = f"the input of {path} has width {width}, which is no multiple of {heads} heads"
        return Heads(reason, reason)
    served = split_heads(Site(path, "input"), heads)
    return Heads(served, served, heads)


def _where_returned(evidence: Evidence, product: torch.Tensor) -> Place | None:
    """The last operation that returns the probabilities times the values, however attention is computed."""
    tolerance = max(evidence.tolerance * 10, 1e-4)
    for operation in sorted(evidence.operations, key=lambda o: -o.ended):
        for candidate in evidence.returned(operation) if operation.times == 1 else ():
            for one in head_vectors(candidate, product.shape[1], product.shape[2]) if candidate.both else ():
                if one.vectors.shape == product.shape and same(one.vectors.double(), product, tolerance):
                    return one.place
    return None
