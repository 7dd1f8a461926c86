"""Numbers out of tensors and arrays of any kind, checked before anything is drawn."""

from __future__ import annotations

from typing import Any

import numpy as np


def as_array(values: Any, what: str, *dims: int) -> np.ndarray:
    """A float array of one of these numbers of axes, from a tensor (any device and dtype), an array or nested lists.

    Raises:
        ValueError: It has another number of axes, or no numbers in it.
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
    """Refuse what cannot be probabilities over the last axis, NaN aside.

    Raises:
        ValueError: A number is negative, or a distribution sums to more than one.
    """
    low, high = float(np.nanmin(array)), float(np.nanmax(np.nansum(array, -1)))
    if low < 0 or high > 1.02:
        found = f"the smallest number is {low:.3g}" if low < 0 else f"one row of them sums to {high:.3g}"
        raise ValueError(
            f"{what} must be probabilities over the vocabulary, but {found}. For logits give .softmax(-1) of them."
        )


def number(value: float) -> str:
    """A probability or score as it is shown on hover: four decimals, or two digits where those would say nothing."""
    if value != value:
        return "–"
    return f"{value:.4f}" if value == 0 or abs(value) >= 0.001 else f"{value:.1e}"
