"""The curves of a targets figure, from a result with target probabilities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from nnterp.display._results import (
    LabelledResult,
    axes_in_words,
    require_result,
    target_ids,
    tensor_of,
    title_of,
    token_namer,
)


@dataclass(frozen=True)
class TargetCurves:
    """What the figure shows.

    Attributes:
        curves: Category → `[prompts, layers]` (or `[layers]`).
        layers: Labels of the layers.
        title: A title.
    """

    curves: dict[str, np.ndarray]
    layers: list[Any]
    title: str


def curves_of_result(given: Any) -> TargetCurves:
    """The target probabilities of a result; of several positions, those at the last one of each prompt.

    Raises:
        ValueError: The result has no target probabilities per layer, or they have an axis too many.
        TypeError: It is no result.
    """
    result = require_result(given, "plot_targets")
    name = next(
        (n for n in ("target_probs", "probs", "scores") if n in result.tensors and "layers" in result.axes[n]), None
    )
    if name is None:
        raise ValueError(f"This result has no target probabilities with a layer axis; it has {axes_in_words(result)}.")
    axes = list(result.axes[name])
    array = tensor_of(result, name)
    if "positions" in axes:
        array = _last_positions(array, axes)
        axes.remove("positions")
    kind = next((axis for axis in ("categories", "targets") if axis in axes), None)
    order = [axis for axis in (kind, "prompts", "layers") if axis is not None and axis in axes]
    if sorted(order) != sorted(axes):
        raise ValueError(f"{name} has axes {', '.join(axes)}; curves are drawn of categories, prompts and layers.")
    array = np.transpose(array, [axes.index(axis) for axis in order])
    if kind is None:
        array, labels = array[None], [name.removesuffix("_probs")]
    else:
        labels = _target_labels(result, kind)
    return TargetCurves(
        dict(zip(labels, array, strict=True)), list(result.labels["layers"]), title_of(result, "Targets")
    )


def _last_positions(array: np.ndarray, axes: list[str]) -> np.ndarray:
    """The numbers at the last position that is not NaN."""
    moved = np.moveaxis(array, axes.index("positions"), -1)
    there = ~np.isnan(moved)
    last = np.where(there.any(-1), moved.shape[-1] - 1 - np.argmax(there[..., ::-1], axis=-1), 0)
    return np.take_along_axis(moved, last[..., None], -1)[..., 0]


def _target_labels(result: LabelledResult, kind: str) -> list[str]:
    """A distinct label per target: its token, if that is the same for all prompts."""
    labels = [str(label) for label in result.labels[kind]]
    if kind == "targets" and "target_ids" in result.tensors:
        name = token_namer(result, None)
        labels = [
            name(column[0]) if len(set(column)) == 1 else f"target {i}"
            for i, column in enumerate(target_ids(result).T.tolist())
        ]
    return [f"{label} ({i})" if labels.count(label) > 1 else label for i, label in enumerate(labels)]
