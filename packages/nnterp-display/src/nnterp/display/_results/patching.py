"""Read the scores of a patching sweep from a result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nnterp.display._results.alignment import check_aligned, is_index
from nnterp.display._results.labelled import (
    LabelledResult,
    about,
    arguments,
    main_tensor,
    require_result,
    score_name,
    title_of,
    token_rows,
)
from nnterp.display._results.picking import Picked, choose_prompt, is_mean, pick


@dataclass(frozen=True)
class Sweep:
    """What `plot_patching` draws of a result.

    Attributes:
        scores: `[layers, columns]`.
        layers, columns: Labels of these axes.
        column_axis: Title of the axis of columns.
        score: What the scores are.
        title: The figure's title.
        prompts: `[layers, columns]`, over how many prompts each score is the mean; None if one prompt is drawn.
    """

    scores: np.ndarray
    layers: Sequence[Any]
    columns: Sequence[Any]
    column_axis: str
    score: str
    title: str
    prompts: np.ndarray | None = None


def sweep(given: Any, choose: Mapping[str, Any], prompt: int | None = None) -> Sweep:
    """The result's main tensor over layers and positions (or heads, neurons, or its other axis).

    Args:
        given: The result.
        choose: For each further axis, the label to draw, or "mean".
        prompt: Which prompt to draw, by its index.

    Raises:
        TypeError: `given` is no result.
        ValueError: There are no two such axes, a further axis has several labels and none was chosen, or the mean over
            prompts was chosen and their positions do not correspond.
        IndexError: There is no such prompt.
    """
    result = require_result(given, "plot_patching")
    name = main_tensor(result)
    choose = choose_prompt(result, name, choose, prompt)
    across = _column_axis(result, name, choose)
    if "prompts" in result.axes[name] and is_mean(result, "prompts", choose):
        scores, prompts, details = _mean(result, name, choose, across)
        columns, axis = _labels_of_all(result, across)
    else:
        picked = pick(result, name, choose, "layers", across)
        kept, columns, axis = _labels_of_one(result, across, picked.taken.get("prompts"))
        scores, prompts, details = picked.array[:, kept], None, _details(result, picked, choose)
    what = _what_was_swept(result)
    return Sweep(
        scores=scores,
        layers=list(result.labels["layers"]),
        columns=columns,
        column_axis=axis,
        score=score_name(result, name),
        title=title_of(result, f"{what} ({', '.join(details)})" if details else what),
        prompts=prompts,
    )


def _mean(
    result: LabelledResult, name: str, choose: Mapping[str, Any], across: str
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """The mean over prompts `[layers, columns]`, over how many prompts each is, and words for the title.

    A prompt that has no such position (NaN) does not count in its column.
    """
    if "positions" in result.axes[name] and len(result.labels["prompts"]) > 1:
        check_aligned(result, _position_columns(result, choose))
    others = {axis: label for axis, label in choose.items() if axis != "prompts"}
    picked = pick(result, name, others, "prompts", "layers", across)
    prompts = (~np.isnan(picked.array)).sum(0)
    scores = np.where(prompts > 0, np.nansum(picked.array, 0) / np.maximum(prompts, 1), np.nan)
    most = "" if prompts.min() == prompts.max() else "up to "
    mean = f"mean over {most}{prompts.max()} prompt{'' if prompts.max() == 1 else 's'}"
    return scores, prompts, [*_details(result, picked, others), mean]


def _position_columns(result: LabelledResult, choose: Mapping[str, Any]) -> Sequence[int]:
    """The positions that are drawn as columns, or the one that was chosen; none if they are averaged as well."""
    labels = list(result.labels["positions"])
    if "positions" not in choose:
        return range(len(labels))
    return [] if is_mean(result, "positions", choose) else [i for i, x in enumerate(labels) if x == choose["positions"]]


def _labels_of_one(result: LabelledResult, across: str, prompt: int | None) -> tuple[Sequence[int], Sequence[Any], str]:
    """For one prompt, the columns that it has, their labels, and the title of their axis."""
    labels, rows = list(result.labels[across]), token_rows(result)
    every = range(len(labels))
    if across != "positions" or prompt is None or not rows:
        return every, labels, across.removesuffix("s")
    row = rows[min(prompt, len(rows) - 1)]
    kept = [i for i in every if row[i] is not None]
    return kept, [row[i] for i in kept], "position (token)"


def _labels_of_all(result: LabelledResult, across: str) -> tuple[Sequence[Any], str]:
    """For the mean over prompts, the columns' labels and the title of their axis.

    If all positions are indices, they are called by their token, or by their tokens if prompts differ there.
    """
    labels, rows = list(result.labels[across]), token_rows(result)
    if across != "positions" or not rows or not all(map(is_index, labels)):
        return labels, across.removesuffix("s")
    texts = []
    for column in zip(*rows, strict=True):
        different = list(dict.fromkeys(token for token in column if token is not None))
        texts.append("|".join([*different[:2], "…"] if len(different) > 2 else different))
    return texts, "position (token)"


def _column_axis(result: LabelledResult, name: str, choose: Mapping[str, Any]) -> str:
    axes = [axis for axis in result.axes[name] if axis not in choose]
    if "layers" not in axes:
        raise ValueError(f"{name} has axes {', '.join(axes)}; a patching map needs layers and one other axis.")
    others = [axis for axis in axes if axis != "layers"]
    if not others:
        raise ValueError(f"{name} has the axis layers alone; a patching map needs one other axis.")
    return next((axis for axis in ("positions", "heads", "neurons") if axis in others), others[0])


def _details(result: LabelledResult, picked: Picked, choose: Mapping[str, Any]) -> list[str]:
    """Which label was taken of each axis that has several, and over which axes the scores were averaged."""
    fixed = [
        f"{axis.removesuffix('s')} {result.labels[axis][i]}"
        for axis, i in picked.taken.items()
        if len(result.labels[axis]) > 1
    ]
    return [*fixed, *(f"mean over {axis}" for axis in choose if is_mean(result, axis, choose))]


def _what_was_swept(result: LabelledResult) -> str:
    """The function that made the result, and the value that it patched: "Activation patching of layers_output"."""
    name = str(about(result).get("function", "patching")).replace("_", " ").capitalize()
    values = arguments(result).get("values")
    return f"{name} of {values[0]}" if isinstance(values, list) and len(values) == 1 else name
