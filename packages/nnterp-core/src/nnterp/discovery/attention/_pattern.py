"""Find the softmax over keys, the operation that holds its probabilities, and the scores it is given."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from nnterp.discovery._probe import LENGTH, ROWS
from nnterp.discovery._recording import Operation
from nnterp.discovery.attention._evidence import PRODUCTS, Evidence
from nnterp.tensors import same
from nnterp.traced import Everywhere, Inside, Layout, Place, over


@dataclass(frozen=True)
class Pattern:
    """The attention pattern of one layer.

    Attributes:
        softmaxes: The softmax over keys. Several if the layer computes the same one several times (DiffLlama).
        holders: For each softmax, the last operation that returns its probabilities.
        probs: The probabilities of the first softmax, `[batch, heads, query, key]`.
    """

    softmaxes: list[Operation]
    holders: list[Operation]
    probs: torch.Tensor

    @property
    def softmax(self) -> Operation:
        """The first softmax."""
        return self.softmaxes[0]

    @property
    def heads(self) -> int:
        """Number of query heads."""
        return self.probs.shape[1]

    @property
    def place(self) -> Place:
        """Where the probabilities are served."""
        return together([_served(holder, "output", None, holder.output, self.heads) for holder in self.holders])

    def in_every_call(self, place: Inside) -> list[Inside]:
        """The same argument in each of the calls that run a softmax; `place` alone if it is no such argument."""
        depth = len(place.labels)
        if len(self.softmaxes) == 1 or place.side == "output" or self.softmax.labels[:depth] != place.labels:
            return [place]
        return [Inside(s.path, s.labels[:depth], place.side, place.key) for s in self.softmaxes]


def find_pattern(evidence: Evidence) -> Pattern | None:
    """Find the softmax over keys and its probabilities; None if no such softmax runs."""
    softmaxes = _softmaxes(evidence)
    if not softmaxes:
        return None
    holders = [_holder(evidence, softmax) for softmax in softmaxes]
    return Pattern(softmaxes, holders, by_head(holders[0].output))


def find_scores(evidence: Evidence, pattern: Pattern) -> Place | None:
    """Where the scores of every softmax are served, without the column of a sink; None if one has no such place."""
    places = [_scores(evidence, softmax, pattern) for softmax in pattern.softmaxes]
    found = [place for place in places if place is not None]
    return together(found) if len(found) == len(places) else None


def together(places: list[Place]) -> Place:
    """One place for all of them: the place itself if there is one, else `Everywhere`."""
    return places[0] if len(places) == 1 else Everywhere(tuple(places))


def is_pattern(tensor: torch.Tensor) -> bool:
    """Whether a tensor has a shape of scores: `[rows, heads, query, key]`, or with rows and heads in one axis."""
    if not tensor.is_floating_point() or tensor.dim() not in (3, 4) or tensor.shape[-1] < tensor.shape[-2]:
        return False
    if tensor.dim() == 4:
        return tensor.shape[0] == ROWS and tensor.shape[2] >= LENGTH
    return tensor.shape[0] % ROWS == 0 and tensor.shape[0] > ROWS and tensor.shape[1] >= LENGTH


def by_head(tensor: torch.Tensor) -> torch.Tensor:
    """Scores or probabilities as `[rows, heads, query, key]`."""
    return tensor if tensor.dim() == 4 else tensor.reshape(ROWS, -1, *tensor.shape[1:])


def _served(
    operation: Operation, side: Literal["input", "output"], key: str | int | None, tensor: torch.Tensor, heads: int
) -> Place:
    """Where a pattern is served as `[batch, heads, query, key]`, given the tensor as the model stores it."""
    flat = tensor.dim() == 3
    layout = Layout("[batch × heads, query, key]", heads) if flat else Layout("[batch, seq, heads, ...]")
    return over(Inside(operation.path, operation.labels, side, key), layout)


def _softmaxes(evidence: Evidence) -> list[Operation]:
    """The first softmax over keys, and later ones that return the same numbers."""
    found: list[Operation] = []
    for operation in evidence.operations:
        output = operation.output
        if operation.function is None or operation.times > 1 or not isinstance(output, torch.Tensor):
            continue
        if not _is_softmax(operation) or not is_pattern(output):
            continue
        if any(operation.labels[: len(f.labels)] == f.labels and operation.path == f.path for f in found):
            continue  # runs inside a softmax that was found
        if not found or same(output, found[0].output, evidence.tolerance):
            found.append(operation)
    return found


def _is_softmax(operation: Operation) -> bool:
    names = (operation.called, operation.labels[-1], operation.function.__class__.__name__)
    return any("softmax" in name.lower() for name in names)


def _holder(evidence: Evidence, softmax: Operation) -> Operation:
    """The last operation that returns the softmax's numbers (without the column of a sink) before they are used.

    They are used by the first matrix product that is given them. What holds them after that is a copy (ProphetNet
    reshapes one for its output).
    """
    whole = by_head(softmax.output)

    def holds(tensor: torch.Tensor) -> bool:
        mine = by_head(tensor) if is_pattern(tensor) else None
        return mine is not None and any(same(mine, one, evidence.tolerance) for one in (whole, whole[..., :-1]))

    beside = evidence.beside(softmax)
    products = [o for o in beside if o.began > softmax.ended and o.called in PRODUCTS]
    used = min((o.began for o in products if any(holds(t) for _, t in o.tensors_in())), default=math.inf)
    holders = [
        o for o in beside if softmax.began < o.began < used and isinstance(o.output, torch.Tensor) and holds(o.output)
    ]
    return holders[-1] if holders else softmax


def _scores(evidence: Evidence, softmax: Operation, pattern: Pattern) -> Place | None:
    """What one softmax is given: its own input, or the last operation before it whose softmax gives the probabilities.

    The second is needed where the softmax's input has one more column, for a sink.
    """
    heads, keys = pattern.heads, pattern.probs.shape[-1]
    given = next(((key, tensor) for key, tensor in softmax.tensors_in() if is_pattern(tensor)), None)
    if given is not None and given[1].shape[-1] == keys:
        return _served(softmax, "input", *given, heads)
    probs = by_head(softmax.output)[..., :keys]
    for operation in reversed(evidence.beside(softmax)):
        output = operation.output
        if operation.ended >= softmax.began or not isinstance(output, torch.Tensor) or not is_pattern(output):
            continue
        mine = by_head(output)
        if mine.shape[-1] == keys and mine.shape[1] == heads and _gives(mine, probs, evidence.tolerance):
            return _served(operation, "output", None, output, heads)
    return None


def _gives(scores: torch.Tensor, probs: torch.Tensor, tolerance: float) -> bool:
    """Whether the softmax of `scores` is `probs` up to one factor per row (a sink takes a share of every row)."""
    made = scores.double().softmax(-1)
    share = probs.double().sum(-1, keepdim=True)
    return same(made * share, probs.double(), max(tolerance, 1e-5))
