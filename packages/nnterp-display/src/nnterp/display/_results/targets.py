"""Read the probabilities of targets over layers from a result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nnterp.display._results.labelled import (
    LabelledResult,
    array_of,
    describe_tensors,
    require_result,
    title_of,
    token_namer,
)


@dataclass(frozen=True)
class TargetCurves:
    """What `plot_targets` draws of a result.

    Attributes:
        curves: Target → `[prompts, layers]`, or `[layers]` if the result has no axis of prompts.
        layers: Labels of the layers.
        title: The figure's title.
    """

    curves: dict[str, np.ndarray]
    layers: Sequence[Any]
    title: str


def target_curves(given: Any, value: str = "probability") -> TargetCurves:
    """The result's target probabilities, or ranks from 1, by layer; of positions each prompt's last is taken.

    Raises:
        TypeError: `given` is no result.
        ValueError: It has no target probabilities with a layer axis, or they have an axis that curves do not have.
    """
    result = require_result(given, "plot_targets")
    known = ("target_ranks",) if value == "rank" else ("target_probs", "probs", "scores")
    name = next((name for name in known if name in result.tensors and "layers" in result.axes[name]), None)
    if name is None:
        if value == "rank":
            raise ValueError(
                f"This result has no ranks of targets with a layer axis; it has {describe_tensors(result)}. "
                f"Make it with logit_lens_table(targets=...) or logit_lens(targets=..., ranks=True)."
            )
        raise ValueError(
            f"This result has no target probabilities with a layer axis; it has {describe_tensors(result)}."
        )
    axes = list(result.axes[name])
    array = array_of(result, name)
    if value == "rank":
        array = np.where(array < 0, np.nan, array + 1.0)  # the result counts from 0, and says -1 for none
    if "positions" in axes:
        array = _last_of_each(array, axes.index("positions"))
        axes.remove("positions")
    kind = next((axis for axis in ("categories", "targets") if axis in axes), None)
    order = [axis for axis in (kind, "prompts", "layers") if axis is not None and axis in axes]
    if sorted(order) != sorted(axes):
        raise ValueError(f"{name} has axes {', '.join(axes)}; curves are drawn of categories, prompts and layers.")
    array = np.transpose(array, [axes.index(axis) for axis in order])
    if kind is None:
        curves = {name.removesuffix("_probs"): array}
    else:
        curves = dict(zip(_target_labels(result, kind), array, strict=True))
    return TargetCurves(curves, result.labels["layers"], title_of(result, "Targets"))


def _last_of_each(array: np.ndarray, axis: int) -> np.ndarray:
    """Along an axis of positions, the last value that is not NaN (NaN stands past the end of a prompt)."""
    moved = np.moveaxis(array, axis, -1)
    there = ~np.isnan(moved)
    last = np.where(there.any(-1), moved.shape[-1] - 1 - np.argmax(there[..., ::-1], axis=-1), 0)
    return np.take_along_axis(moved, last[..., None], -1)[..., 0]


def _target_labels(result: LabelledResult, kind: str) -> list[str]:
    """A name for each target: its token if all prompts have the same one there, else its number."""
    labels = [str(label) for label in result.labels[kind]]
    if kind == "targets" and "target_ids" in result.tensors:
        ids = array_of(result, "target_ids").astype(int)
        name = token_namer(result, None)
        labels = [
            name(column[0]) if len(set(column)) == 1 else f"target {i}" for i, column in enumerate(ids.T.tolist())
        ]
    return [f"{label} ({i})" if labels.count(label) > 1 else label for i, label in enumerate(labels)]
