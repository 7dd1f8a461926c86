"""What each part adds to a logit by itself: a map of layers and heads, or bars."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from nnterp.display._arrays import as_array, axis_labels, number
from nnterp.display._components import bars
from nnterp.display._patching import plot_patching
from nnterp.display._results.direct import direct_scores
from nnterp.display._results.labelled import is_numbers
from nnterp.display._results.picking import refuse_choice
from nnterp.display._theme import shown

_HEAD = re.compile(r"L(\d+)\.H(\d+)")
_SUBLAYER = re.compile(r"L(\d+) (.+)")


def plot_direct_attribution(
    scores: Any,
    parts: Sequence[Any] | None = None,
    *,
    most: int = 40,
    score: str = "logit",
    title: str | None = None,
    prompt: int | None = None,
    show: bool = False,
    **choose: Any,
) -> go.Figure:
    """What each part adds to a logit, or a difference of logits.

    Heads and sublayers are drawn as a map: layers from bottom to top, heads from left to right, then a column for each
    other thing that a layer adds. What belongs to no layer (embeddings, the last biases) is in the title. Layers,
    neurons, positions and tokens are drawn as bars, the first at the top.

    Args:
        scores: `[parts]`, or the result of `direct_logit_attribution` of `nnterp.interventions`.
        parts: Their names ("L3.H5", "L3 mlp", "embeddings"); 0, 1, … if None.
        most: The largest number of bars. If there are more parts, those with the largest absolute scores are drawn, and
            the title says so.
        score: The name of what the parts add to.
        title: Plain text.
        prompt: For a result of several prompts, which one to draw, by its index.
        show: Also show the figure, in a notebook or a browser.
        **choose: For a result of several prompts, which one to draw by its text (`prompts="..."`), or `prompts="mean"`.

    Returns:
        The figure, coloured from −m to m around zero.

    Raises:
        ValueError: There is not one name for each score, `most` is not positive, the result has several prompts and
            none was chosen, or the mean was chosen of scores by position or token.
        IndexError: There is no such prompt.

    Example:
        >>> from nnterp import display
        >>> figure = display.plot_direct_attribution([0.5, -0.2, 0.1], ["L0.H0", "L0.H1", "L0 mlp"])
        >>> figure.data[0].z.tolist()
        [[0.5, -0.2, 0.1]]
    """
    if most < 1:
        raise ValueError(f"most is the number of bars, at least 1, not {most!r}.")
    if is_numbers(scores):
        refuse_choice("plot_direct_attribution", choose, prompt)
        values = as_array(scores, "scores ([parts])", 1)
    else:
        read = direct_scores(scores, choose, prompt)
        values, parts = read.values, read.parts if parts is None else parts
        score = read.score if score == "logit" else score
        title = read.title if title is None else title
    names = axis_labels(parts, len(values), "parts", "scores")
    label = f"added to the {score}"
    if drawn := _map(names, values):
        cells, columns, axis, rest = drawn
        whole = f"{title or ''}{': ' if title and rest else ''}{rest}"
        figure = plot_patching(cells, columns, column_axis=axis, score=label, title=whole or None)
        return shown(figure, show)
    if len(names) > most:
        kept = np.sort(np.argsort(-np.abs(np.nan_to_num(values)), kind="stable")[:most])
        title = f"{title or 'Direct attribution'}: the {most} largest of {len(names)} parts"
        names, values = [names[i] for i in kept], values[kept]
    return shown(bars(names, values, label, title, [f"{label} {number(value)}" for value in values]), show)


def _map(names: Sequence[str], values: np.ndarray) -> tuple[np.ndarray, list[str], str, str] | None:
    """Cells `[layers, columns]`, the columns' labels, their axis, and in words what is in no cell; None for bars."""
    heads = {i: found for i, name in enumerate(names) if (found := _HEAD.fullmatch(name))}
    others = {i: found for i, name in enumerate(names) if (found := _SUBLAYER.fullmatch(name))}
    left = [i for i in range(len(names)) if i not in heads and i not in others]
    if not heads and (not others or any(names[i] not in ("embeddings", "bias") for i in left)):
        return None
    if any(re.match(r"L\d+", names[i]) for i in left):  # neurons
        return None
    width = 1 + max((int(found[2]) for found in heads.values()), default=-1)
    kinds = list(dict.fromkeys(found[2] for found in others.values()))
    layers = 1 + max(int(found[1]) for found in (*heads.values(), *others.values()))
    cells = np.full((layers, width + len(kinds)), np.nan)
    for i, found in heads.items():
        cells[int(found[1]), int(found[2])] = values[i]
    for i, found in others.items():
        cells[int(found[1]), width + kinds.index(found[2])] = values[i]
    columns = [*map(str, range(width)), *kinds]
    rest = ", ".join(f"{names[i]} {number(values[i])}" for i in left)
    return cells, columns, "head, and what else a layer adds" if heads else "sublayer", rest
