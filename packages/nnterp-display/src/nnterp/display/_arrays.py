"""Tensors and arrays of any kind as checked numpy arrays."""

from __future__ import annotations

from typing import Any

import numpy as np


def as_array(values: Any, what: str, *dims: int) -> np.ndarray:
    """A float64 array, from a tensor (any device and dtype), an array or nested lists.

    Args:
        values: The numbers.
        what: What errors call them.
        *dims: How many axes they may have.

    Raises:
        ValueError: They have another number of axes, or there are none.
    """
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = values.double().numpy() if values.dtype.is_floating_point else values.numpy()
    array = np.asarray(values, dtype=float)
    if array.ndim not in dims:
        allowed = " or ".join(str(dim) for dim in dims)
        raise ValueError(f"{what} must have {allowed} axes; what was given has shape {list(array.shape)}.")
    if array.size == 0:
        raise ValueError(f"{what} is empty (shape {list(array.shape)}), so there is nothing to draw.")
    return array


def check_probabilities(array: np.ndarray, what: str) -> None:
    """Check that an array can hold probabilities over its last axis; NaN is ignored.

    Raises:
        ValueError: A number is negative, or a distribution sums to more than one.
    """
    low, high = float(np.nanmin(array)), float(np.nanmax(np.nansum(array, -1)))
    if low < 0 or high > 1.02:
        found = f"the smallest number is {low:.3g}" if low < 0 else f"one row of them sums to {high:.3g}"
        raise ValueError(
            f"{what} must be probabilities over the vocabulary, but {found}. For logits give .softmax(-1) of them."
        )


def top_tokens(values: Any, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The `k` largest of next-token probabilities and their token ids, both `[prompts, layers, k]`, largest first.

    Args:
        values: `[prompts, layers, vocab]`, `[layers, vocab]` or `[vocab]`.
        k: How many tokens.

    Raises:
        ValueError: These are no probabilities over the vocabulary, or `k` is not between 1 and its size.
    """
    probs = as_array(values, "next_token_probs ([prompts, layers, vocab])", 1, 2, 3)
    probs = probs.reshape((1,) * (3 - probs.ndim) + probs.shape)
    check_probabilities(probs, "next_token_probs")
    if not 1 <= k <= probs.shape[-1]:
        raise ValueError(f"k goes from 1 to {probs.shape[-1]}, the size of the vocabulary, not {k}.")
    ids = np.argsort(-probs, axis=-1, kind="stable")[..., :k]
    return np.take_along_axis(probs, ids, -1), ids


def number(value: float) -> str:
    """A probability or score as hover texts show it: four decimals, or two significant digits below 0.001."""
    if value != value:
        return "–"
    return f"{value:.4f}" if value == 0 or abs(value) >= 0.001 else f"{value:.1e}"
