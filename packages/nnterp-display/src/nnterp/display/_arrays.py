"""Convert tensors to arrays, check them and the labels of their axes, and write numbers as text."""

from __future__ import annotations

from typing import Any

import numpy as np

from nnterp.arguments import listed
from nnterp.indices import shown


def as_array(values: Any, what: str, *dims: int) -> np.ndarray:
    """The values as a float array with `dims` axes; several `dims` are alternatives.

    Args:
        values: A tensor of any device and dtype, an array, or nested lists.
        what: The argument, as errors call it.
        *dims: The numbers of axes that are allowed.

    Raises:
        ValueError: The array has another number of axes, or is empty.
        TypeError: These are no numbers, or not of one shape.
    """
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = values.double().numpy() if values.dtype.is_floating_point else values.numpy()
    try:
        array = np.asarray(values, dtype=float)
    except (TypeError, ValueError):
        raise TypeError(f"{what} must be numbers of one shape, not {shown(values)}.") from None
    if array.ndim not in dims:
        allowed = " or ".join(str(dim) for dim in dims)
        raise ValueError(f"{what} must have {allowed} axes; what was given has shape {list(array.shape)}.")
    if array.size == 0:
        raise ValueError(f"{what} is empty (shape {list(array.shape)}), so there is nothing to draw.")
    return array


def check_probabilities(array: np.ndarray, what: str) -> None:
    """Check that `array` can hold probabilities over its last axis; NaN is ignored.

    Raises:
        ValueError: A number is negative, or the last axis sums to more than 1.02 somewhere.
    """
    low, high = float(np.nanmin(array)), float(np.nanmax(np.nansum(array, -1)))
    if low < 0 or high > 1.02:
        found = f"the smallest number is {low:.3g}" if low < 0 else f"one row of them sums to {high:.3g}"
        raise ValueError(
            f"{what} must be probabilities over the vocabulary, but {found}. For logits give .softmax(-1) of them."
        )


def check_same(what: str, got: int, expected: int, of: str) -> None:
    """Check that there are as many labels (`got`) as an axis is long (`expected`).

    Args:
        what: The argument that holds the labels.
        got: How many labels there are.
        expected: The length of the axis.
        of: The axis, in words.

    Raises:
        ValueError: The two differ.
    """
    if got != expected:
        raise ValueError(f"{what} has {got} entries, but {of} has {expected}. Give one label for each.")


def axis_labels(labels: Any, count: int, what: str, of: str) -> list[str]:
    """The labels of an axis of length `count` as text; 0, 1, … if `labels` is None.

    Raises:
        ValueError: There is not one label for each entry; `what` and `of` name the argument and the axis.
    """
    plain: Any = labels.tolist() if hasattr(labels, "tolist") else labels
    given = range(count) if plain is None else listed(plain, what, "a list of labels, one for each entry")
    names = [str(label) for label in given]
    check_same(what, len(names), count, of)
    return names


def number(value: float) -> str:
    """A probability or score as hover text: four decimals, two significant digits below 0.001, – for NaN."""
    if value != value:
        return "–"
    return f"{value:.4f}" if value == 0 or abs(value) >= 0.001 else f"{value:.1e}"
