"""Attention patterns as they are given to figures: tensors with labels, or results; checked and named."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from nnterp.display._arrays import as_array, check_same
from nnterp.display._results.attention import Patterns, patterns
from nnterp.display._results.labelled import is_numbers
from nnterp.display._results.picking import refuse_choice
from nnterp.display._text import as_names


def read_pattern(
    figure: str,
    pattern: Any,
    tokens: Sequence[Any] | None,
    tokenizer: Any,
    layers: Sequence[Any] | None,
    heads: Sequence[Any] | None,
    prompt: int | None,
    weighted: bool,
) -> Patterns:
    """The pattern with a visible text for each key; the arguments are those of `plot_attention`.

    Raises:
        ValueError: These are no probabilities, or there is not one token for each key.
    """
    if is_numbers(pattern):
        refuse_choice(figure, {}, prompt)
    else:
        read = patterns(pattern, prompt)
        pattern = read.values
        tokens = read.tokens if tokens is None else tokens
        weighted = weighted or read.weighted
        layers = read.layers if layers is None else layers
        heads = read.heads if heads is None else heads
    probs = as_array(pattern, "pattern ([query, key], [heads, query, key] or [layers, heads, query, key])", 2, 3, 4)
    _check_pattern(probs, weighted)
    keys = probs.shape[-1]
    names = [str(i) for i in range(keys)] if tokens is None else as_names(tokens, tokenizer)
    check_same("tokens", len(names), keys, "the key axis of pattern")
    return Patterns(probs, names, layers, heads, weighted)


def is_causal(probs: np.ndarray) -> bool:
    """True if there are keys after some query, and all their numbers are exactly 0."""
    later = future(probs)
    return bool(later.any()) and not np.nan_to_num(probs[..., later]).any()


def future(probs: np.ndarray) -> np.ndarray:
    """`[query, key]`, True at keys after the query; the queries are the last of the keys' tokens."""
    queries, keys = probs.shape[-2:]
    return np.triu(np.ones((queries, keys), dtype=bool), keys - queries + 1)


def _check_pattern(probs: np.ndarray, weighted: bool) -> None:
    low, high = float(np.nanmin(probs)), float(np.nanmax(np.nansum(probs, -1)))
    if low < 0 or (high > 1.02 and not weighted):
        found = f"the smallest number is {low:.3g}" if low < 0 else f"one query's probabilities sum to {high:.3g}"
        raise ValueError(f"pattern must hold attention probabilities (after the softmax), but {found}.")
    queries, keys = probs.shape[-2:]
    if queries > keys:
        raise ValueError(f"pattern has {queries} queries but only {keys} keys; its last two axes are [query, key].")
