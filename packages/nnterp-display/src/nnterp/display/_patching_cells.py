"""The cells of a patching map, from the result of a sweep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from nnterp.display._alignment import shared_columns
from nnterp.display._results import (
    LabelledResult,
    Picked,
    about_of,
    averages,
    pick,
    require_result,
    score_name,
    title_of,
    tokens_at,
)


@dataclass(frozen=True)
class PatchingCells:
    """What the map shows.

    Attributes:
        scores: `[layers, columns]`.
        layers, columns: Labels of the axes.
        column_axis: Name of the columns' axis.
        score: What the score is.
        title: A title.
        counts: `[layers, columns]`, how many prompts each score is the mean of; None if it is not a mean over prompts.
        prompts: How many prompts the result has.
    """

    scores: np.ndarray
    layers: list[Any]
    columns: list[Any]
    column_axis: str
    score: str
    title: str
    counts: np.ndarray | None
    prompts: int


def cells_of_sweep(given: Any, choose: Mapping[str, Any], prompt: int | None = None) -> PatchingCells:
    """A sweep's main tensor by layer and one other axis: positions, heads or neurons, else the first there is.

    Args:
        given: The result.
        choose: Axis name to the label to take there, or to "mean" to average over the axis.
        prompt: Index of the prompt to draw.

    Raises:
        ValueError: There is no axis to put across, or another axis has several labels and none was chosen; or the mean
            over prompts was asked for and a column is not the same place in every prompt.
        IndexError: There is no such prompt.
        TypeError: It is no result.
    """
    result = require_result(given, "plot_patching")
    name = next(iter(result.tensors))
    across = _column_axis(result, name, choose if prompt is None else {**choose, "prompts": prompt})
    picked = pick(result, name, choose, "layers", across, prompt=prompt)
    texts: list[str] | None = None
    counts = None
    if averages(result, choose, "prompts"):
        texts = shared_columns(result, choose.get("positions")) if "positions" in result.axes[name] else None
        counts = _prompts_behind(result, name, choose, across)
    elif "prompts" in picked.taken:
        texts = tokens_at(result, picked.taken["prompts"])
    columns, column_axis = list(result.labels[across]), across.removesuffix("s")
    if across == "positions":
        columns, column_axis = texts or columns, "position (token)" if texts else "position"
    shown = _shown_part(result, choose, picked)
    return PatchingCells(
        scores=picked.values,
        layers=list(result.labels["layers"]),
        columns=columns,
        column_axis=column_axis,
        score=score_name(result, name),
        title=title_of(result, f"{_sweep_name(result)}{f' ({shown})' if shown else ''}"),
        counts=counts,
        prompts=len(result.labels.get("prompts", ())),
    )


def _prompts_behind(result: LabelledResult, name: str, choose: Mapping[str, Any], across: str) -> np.ndarray:
    """`[layers, columns]`: for how many prompts there is a score."""
    others = {axis: label for axis, label in choose.items() if axis != "prompts"}
    each = pick(result, name, others, "prompts", "layers", across).values
    return (~np.isnan(each)).sum(0)


def _column_axis(result: LabelledResult, name: str, choose: Mapping[str, Any]) -> str:
    axes = [axis for axis in result.axes[name] if axis not in choose]
    if "layers" not in axes:
        raise ValueError(f"{name} has axes {', '.join(axes)}; a patching map needs layers and one other axis.")
    others = [axis for axis in axes if axis != "layers"]
    if not others:
        raise ValueError(f"{name} has the axis layers alone; a patching map needs one other axis.")
    return next((axis for axis in ("positions", "heads", "neurons") if axis in others), others[0])


def _shown_part(result: LabelledResult, choose: Mapping[str, Any], picked: Picked) -> str:
    """Which part of the result the map shows, for the title: "head 3, mean over prompts"."""
    fixed = [
        f"{axis.removesuffix('s')} {result.labels[axis][i]}"
        for axis, i in picked.taken.items()
        if len(result.labels[axis]) > 1
    ]
    return ", ".join([*fixed, *(f"mean over {axis}" for axis in choose if averages(result, choose, axis))])


def _sweep_name(result: LabelledResult) -> str:
    """Name of the function that made the sweep and of what it patched: "Activation patching of layers_output"."""
    about, arguments = about_of(result)
    name = str(about.get("function", "patching")).replace("_", " ").capitalize()
    values = arguments.get("values")
    return f"{name} of {values[0]}" if isinstance(values, list) and len(values) == 1 else name
