"""Find queries and keys: two tensors whose product is recorded among the scores, up to a scale and a bias."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from nnterp.discovery.attention._evidence import Candidate, Evidence, best
from nnterp.discovery.attention._head_vectors import HeadVectors, head_vectors, repeated
from nnterp.discovery.attention._pattern import Pattern, by_head, is_pattern, together
from nnterp.traced import Place, over


@dataclass(frozen=True)
class QueriesAndKeys:
    """A tensor of queries, and one of keys whose vectors are as wide."""

    queries: HeadVectors
    keys: HeadVectors

    @property
    def both(self) -> bool:
        """True if the two tensors are there when the model computes attention in its own way, too."""
        return self.queries.both and self.keys.both

    def product(self) -> torch.Tensor:
        """Each query times each key, `[batch, heads, query, key]`, float64."""
        queries = self.queries.vectors.double()
        keys = repeated(self.keys.vectors, queries.shape[2]).double()
        return torch.einsum("bqhd,bkhd->bhqk", queries, keys)

    def places(self, pattern: Pattern) -> tuple[Place, Place]:
        """Where queries and keys are served, in every call that runs a softmax."""
        queries, keys = (
            together([over(place, one.layout) for place in pattern.in_every_call(one.candidate.place)])
            for one in (self.queries, self.keys)
        )
        return queries, keys


def find_queries_and_keys(evidence: Evidence, pattern: Pattern) -> QueriesAndKeys | None:
    """Find the two tensors whose product explains the scores; None if there are no such two.

    Two that are there however attention is computed are preferred.
    """
    scores = _recorded_scores(evidence, pattern)

    def fits(pair: QueriesAndKeys) -> bool:
        product = pair.product()
        return any(explains(product, one, evidence.tolerance) for one in scores)

    return best(_pairs(evidence, pattern), fits)


def _pairs(evidence: Evidence, pattern: Pattern) -> Iterator[QueriesAndKeys]:
    """Every two tensors before the softmax that have the shapes of queries and keys."""
    early = [candidate for candidate in evidence.around(pattern.softmax) if candidate.when <= pattern.softmax.began]
    keys = list(_of_length(early, pattern.probs.shape[3], pattern.heads))
    for query in _of_length(early, pattern.probs.shape[2], pattern.heads):
        if query.vectors.shape[2] != pattern.heads:
            continue
        for key in keys:
            if key.candidate.place != query.candidate.place and key.vectors.shape[-1] == query.vectors.shape[-1]:
                yield QueriesAndKeys(query, key)


def _of_length(candidates: list[Candidate], length: int, heads: int) -> Iterator[HeadVectors]:
    for candidate in candidates:
        yield from head_vectors(candidate, length, heads)


def _recorded_scores(evidence: Evidence, pattern: Pattern) -> list[torch.Tensor]:
    """Tensors before the softmax with the shape of scores, `[batch, heads, query, key]`, float64, without a sink."""
    softmax, keys = pattern.softmax, pattern.probs.shape[-1]
    shapes = (pattern.probs.shape[1:], (*pattern.probs.shape[1:3], keys + 1))
    made = [
        by_head(o.output)
        for o in evidence.operations
        if o.path == softmax.path
        and o.ended < softmax.began
        and isinstance(o.output, torch.Tensor)
        and is_pattern(o.output)
        and by_head(o.output).shape[1:] in shapes
    ]
    given = [by_head(tensor) for _, tensor in softmax.tensors_in() if is_pattern(tensor)]
    return [scores.double()[..., :keys] for scores in (*made, *given)]


def explains(product: torch.Tensor, scores: torch.Tensor, tolerance: float) -> bool:
    """Whether scores are the products times one factor per head, plus a bias linear in both positions (ALiBi).

    Masked entries, and keys after the query, are left out.

    Args:
        product: Queries times keys, `[batch, heads, query, key]`.
        scores: Of the same shape.
        tolerance: The largest relative error that counts as equal.
    """
    if product.shape != scores.shape:
        return False
    _, heads, queries, keys = product.shape
    i = torch.arange(queries, device=product.device, dtype=product.dtype)[:, None].expand(queries, keys)
    j = torch.arange(keys, device=product.device, dtype=product.dtype)[None, :].expand(queries, keys)
    for head in range(heads):
        y, x = scores[:, head], product[:, head]
        seen = torch.isfinite(y) & (y > -1e4) & (j <= i + keys - queries)[None]
        if seen.sum() < 8:
            return False
        columns = torch.stack([x[seen], torch.ones_like(x[seen]), i.expand_as(y)[seen], j.expand_as(y)[seen]], dim=1)
        goal = y[seen][:, None]
        fit = torch.linalg.lstsq(columns, goal).solution
        off = (columns @ fit - goal).abs().max()
        allowed = max(tolerance * 10, 1e-4) * y[seen].abs().max().clamp(min=1e-6)
        if fit[0].abs() * x[seen].std() < 1e-6 or off > allowed:
            return False
    return True
