"""Queries and keys through the softmax: the pattern that patched queries or keys make (AtP*, Kramár et al., 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nnterp.errors import Unavailable
from nnterp.interventions._engine import Key
from nnterp.interventions._states import States

QUERIES, KEYS, SCORES, PATTERN = (
    "attention_queries",
    "attention_keys",
    "attention_scores",
    "attention_probabilities",
)
INSIDE = (QUERIES, KEYS, SCORES, PATTERN)  # what is read of each run


def inside_of(layers: Sequence[int]) -> list[Key]:
    """The values of each layer that are read."""
    return [(name, layer) for layer in layers for name in INSIDE]


@dataclass(frozen=True)
class Attention:
    """How one layer of one run makes its pattern of queries and keys; float32.

    Attributes:
        queries, keys: `[heads, seq, head_dim]`, keys repeated where several heads share them.
        scores: What the softmax is given, `[heads, query, key]`.
        pattern: What it returns.
        live: Where the scores are not masked, `[heads, query, key]`.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    scores: torch.Tensor
    pattern: torch.Tensor
    live: torch.Tensor

    @property
    def products(self) -> torch.Tensor:
        """`q · k`, `[heads, query, key]`."""
        return self.queries @ self.keys.transpose(-1, -2)


def attention_of(states: States, layer: int) -> Attention:
    """One layer's attention in one run.

    Raises:
        Unavailable: There is not one pattern for each head of the queries.
    """
    queries, keys, scores, pattern = (states[name, layer] for name in INSIDE)
    if queries.shape[1] != scores.shape[0] or scores.shape[0] % keys.shape[1]:
        raise Unavailable(
            f'method="attention-aware" needs one pattern for each head, and layer {layer} has {scores.shape[0]} '
            f'patterns for {queries.shape[1]} heads of queries and {keys.shape[1]} of keys. Take method="gradient".'
        )
    live = scores > torch.finfo(scores.dtype).min / 4
    queries, keys = (repeated(tensor.float(), scores.shape[0]).transpose(0, 1) for tensor in (queries, keys))
    return Attention(queries, keys, scores.float(), pattern.float(), live)


def repeated(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """`[seq, kv_heads, ...]` as `[seq, heads, ...]`: neighbouring heads share one of grouped keys."""
    return tensor.repeat_interleave(heads // tensor.shape[1], dim=1)


def scales(runs: Sequence[tuple[Attention, Attention]], layer: int, who: str, eps: float) -> torch.Tensor:
    """The factor of each head in `scores = factor · (q · k) + what depends on the positions alone`, float32 `[heads]`.

    It is read off pairs of runs, and the relation is checked on every score of theirs: as it stands, without the second
    term, or else by the difference of the two runs of a pair, in which that term is gone.

    Args:
        runs: Pairs of runs of one layer.
        layer: For errors.
        who: The model's class, for errors.
        eps: Rounding of the model's dtype.

    Raises:
        Unavailable: The relation does not hold (capped scores, latent attention), or the pattern is not the softmax of
            the scores alone (attention sinks); says by how much.
    """
    tolerance = max(1e-4, 16 * eps)
    for run in (run for pair in runs for run in pair):
        apart = float((run.scores.softmax(-1) - run.pattern).abs().max())
        if not apart <= tolerance:
            raise Unavailable(
                f'method="attention-aware" recomputes the softmax, and the pattern of layer {layer} of {who} is not '
                f"the softmax of its scores alone: they differ by up to {apart:.2g}, as with attention sinks. "
                'Take method="gradient" or "integrated".'
            )
    plain = [(run.products, run.scores, run.live) for pair in runs for run in pair]
    largest = max(float(scores[live].abs().max()) for _, scores, live in plain)
    factor, apart = _fitted(plain)
    if apart <= tolerance * max(largest, 1e-30):
        return factor
    changes = [_change(*pair) for pair in runs]
    moved = max((float(change[live].abs().max()) for _, change, live in changes if live.any()), default=0.0)
    factor, between = _fitted(changes)
    if moved > 100 * tolerance * largest and between <= tolerance * largest:
        return factor
    raise Unavailable(
        f'method="attention-aware" recomputes the scores of layer {layer} of {who} as a multiple of q · k plus what '
        f"depends on positions alone, and these are not: the largest score is {largest:.3g}, and they are off by up to "
        f"{apart:.2g} without and {between:.2g} with such a term. Scores may be capped, or made of more than queries "
        f"and keys (or the two prompts may be too alike to tell: their scores differ by at most {moved:.2g}). Take "
        'method="gradient" or "integrated".'
    )


def _change(into: Attention, source: Attention) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What differs between two runs at the positions that both have: products, scores, and where both are live."""
    both = min(into.scores.shape[-1], source.scores.shape[-1])
    cut = (slice(None), slice(both), slice(both))
    return (
        source.products[cut] - into.products[cut],
        source.scores[cut] - into.scores[cut],
        source.live[cut] & into.live[cut],
    )


def _fitted(entries: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, float]:
    """The factor of each head from products to scores by least squares, and the largest error of any score."""
    heads = entries[0][0].shape[0]
    up, down = (torch.zeros(heads, dtype=torch.float64, device=entries[0][0].device) for _ in range(2))
    for products, scores, live in entries:
        x, y = (torch.where(live, tensor, 0.0).double().flatten(1) for tensor in (products, scores))
        up, down = up + (x * y).sum(1), down + x.square().sum(1)
    factor = (up / down.clamp(min=1e-30)).float()
    errors = [
        torch.where(live, scores - factor[:, None, None] * products, 0.0).abs().max()
        for products, scores, live in entries
    ]
    return factor, max(map(float, errors))


def effects_of_queries(
    into: Attention, queries: torch.Tensor, factor: torch.Tensor, slope: torch.Tensor, at: torch.Tensor
) -> torch.Tensor:
    """What each patched query does through the softmax, `[positions, heads]`: (new pattern − old) · the gradient.

    Args:
        into: The attention of the run patched into.
        queries: Of the run patched from, at the positions patched, `[positions, heads, head_dim]`.
        factor: See `scales`.
        slope: The gradient with respect to the pattern, `[heads, query, key]`.
        at: The positions patched.
    """
    change = queries.float().transpose(0, 1) - into.queries[:, at]
    old = into.scores[:, at]
    moved = factor[:, None, None] * (change @ into.keys.transpose(-1, -2))
    new = torch.where(into.live[:, at], old + moved, old)
    return ((new.softmax(-1) - old.softmax(-1)) * slope[:, at].float()).sum(-1).T


def effect_of_keys(
    into: Attention, keys: torch.Tensor, factor: torch.Tensor, slope: torch.Tensor, at: torch.Tensor
) -> torch.Tensor:
    """What keys that are patched together do through the softmax, `[kv_heads]`; arguments as `effects_of_queries`.

    Args:
        into: The attention of the run patched into.
        keys: Of the run patched from, at the positions patched, `[positions, kv_heads, head_dim]`.
        factor: See `scales`.
        slope: The gradient with respect to the pattern, `[heads, query, key]`.
        at: The positions patched.
    """
    heads = into.scores.shape[0]
    change = repeated(keys.float(), heads).transpose(0, 1) - into.keys[:, at]
    moved = torch.zeros_like(into.scores)
    moved[:, :, at] = factor[:, None, None] * (into.queries @ change.transpose(-1, -2))
    new = torch.where(into.live, into.scores + moved, into.scores)
    by_head = ((new.softmax(-1) - into.scores.softmax(-1)) * slope.float()).sum((-2, -1))
    return by_head.unflatten(0, (keys.shape[1], -1)).sum(1)
