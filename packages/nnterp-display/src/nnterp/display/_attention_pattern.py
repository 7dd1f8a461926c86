"""The pattern that an attention figure draws, checked, from a tensor or from a result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nnterp.display._arrays import as_array
from nnterp.display._results import axes_in_words, pick, require_result, tokens_at


@dataclass(frozen=True)
class LabelledPattern:
    """A pattern tensor of a result.

    Attributes:
        values: `[query, key]`, `[heads, query, key]` or `[layers, heads, query, key]`.
        tokens: Texts of the keys.
        layers, heads: Labels of these axes, None where `values` has no such axis.
    """

    values: np.ndarray
    tokens: list[str]
    layers: Sequence[Any] | None
    heads: Sequence[Any] | None


def pattern_of_result(given: Any, prompt: int | None) -> LabelledPattern:
    """The first tensor of a result whose last two axes are queries and keys, of one prompt.

    Raises:
        ValueError: It has no such tensor, or one with another axis of several labels.
        IndexError: There is no such prompt.
        TypeError: It is no result.
    """
    result = require_result(given, "plot_attention")
    names = [
        name for name in result.tensors if tuple(result.axes[name])[-2:] in (("queries", "keys"), ("query", "key"))
    ]
    if not names:
        raise ValueError(
            f"This result has no tensor whose last axes are queries and keys; it has {axes_in_words(result)}."
        )
    query, key = tuple(result.axes[names[0]])[-2:]
    picked = pick(result, names[0], {}, "layers", "heads", query, key, prompt=prompt)
    labels = {axis: list(result.labels[axis]) for axis in ("layers", "heads") if axis in picked.axes}
    tokens = tokens_at(result, picked.taken.get("prompts", 0)) or list(map(str, result.labels[key]))
    return LabelledPattern(picked.values, tokens, labels.get("layers"), labels.get("heads"))


def checked_pattern(pattern: Any) -> np.ndarray:
    """The pattern as an array, with NaN for the future if the model gives it no attention at all.

    Raises:
        ValueError: These are no attention probabilities, or there are more queries than keys.
    """
    probs = as_array(pattern, "pattern ([query, key], [heads, query, key] or [layers, heads, query, key])", 2, 3, 4)
    low, high = float(np.nanmin(probs)), float(np.nanmax(np.nansum(probs, -1)))
    if low < 0 or high > 1.02:
        found = f"the smallest number is {low:.3g}" if low < 0 else f"one query's probabilities sum to {high:.3g}"
        raise ValueError(f"pattern must hold attention probabilities (after the softmax), but {found}.")
    queries, keys = probs.shape[-2:]
    if queries > keys:
        raise ValueError(f"pattern has {queries} queries but only {keys} keys; its last two axes are [query, key].")
    return _blank_future(probs)


def _blank_future(probs: np.ndarray) -> np.ndarray:
    """NaN above the diagonal, if nothing but zeros is there."""
    queries, keys = probs.shape[-2:]
    future = np.triu(np.ones((queries, keys), dtype=bool), keys - queries + 1)
    if future.any() and not np.nan_to_num(probs[..., future]).any():
        return np.where(future, np.nan, probs)
    return probs
