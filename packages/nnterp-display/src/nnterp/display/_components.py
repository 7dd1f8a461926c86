"""Effects of single components (ablated, or patched along a path): a map by layer and head, or a list of bars."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go

from nnterp.display._arrays import as_array, number
from nnterp.display._component_scores import scores_of_result
from nnterp.display._grid import axis_labels, fit, label_pixels, number_ticks
from nnterp.display._patching import plot_patching
from nnterp.display._results import is_numbers, refuse_choices
from nnterp.display._text import escape
from nnterp.display._theme import DIVERGING, MONO, new_figure, shown
from nnterp.token_text import shorten

_LABEL = re.compile(r"(?P<value>\w+)\[(?P<layer>\d+)\](?: head (?P<head>\d+))?(?P<rest> at .*)?$")
_LABEL_COLUMNS = 48  # longer names are cut; hovering shows all of them
_BAR = 24


def plot_components(
    scores: Any,
    components: Sequence[Any] | None = None,
    *,
    baseline: float | None = None,
    score: str = "score",
    prompt: int | None = None,
    title: str | None = None,
    show: bool = False,
    **choose: Any,
) -> go.Figure:
    """How much each component's ablation, or its patched path, changes a score.

    Single heads of several layers are drawn as a map, layer up and head across, and so are whole parts of several
    layers, with a column for each kind of part. Other components are drawn as bars, in their order from the top.

    Args:
        scores: `[components]`, or the result object of `ablate` or `path_patching` of `nnterp.interventions`.
        components: Their names; 0, 1, … if None.
        baseline: The score of the run in which nothing is changed; 0 if None. A result object has its own.
        score: What the score is, with its unit ("logit difference").
        prompt: For a result of several prompts, the index of the one to draw.
        title: Plain text.
        show: Also show the figure, in a notebook or a browser.
        **choose: For a result of several prompts, the text of the one to draw (`prompts="..."`), or `prompts="mean"`.

    Returns:
        The figure, of the changes from the baseline, coloured from −m to m around zero.

    Raises:
        ValueError: Names do not fit, or the result has several prompts and none was chosen.
        IndexError: The result has no prompt `prompt`.
        TypeError: `scores` are neither numbers nor a result.
    """
    if is_numbers(scores):
        refuse_choices("plot_components", choose if prompt is None else {"prompt": prompt})
        values = as_array(scores, "scores ([components])", 1)
        change = values - (0.0 if baseline is None else baseline)
    else:
        own = scores_of_result(scores, choose, prompt)
        values, change = own.scores, own.change
        components = own.components if components is None else components
        score, title = own.score if score == "score" else score, own.title if title is None else title
    names = axis_labels("components", components, len(values), "scores")
    label = f"change of {score}"
    grid = _grid_of(names)
    if grid is None:
        return shown(_bars(names, values, change, score, label, title), show)
    cells = np.full((len(grid.layers), len(grid.columns)), np.nan)
    for place, moved in zip(grid.places, change, strict=True):
        cells[place] = moved
    return plot_patching(
        cells, grid.columns, layers=grid.layers, column_axis=grid.column_axis, score=label, title=title, show=show
    )


@dataclass(frozen=True)
class _Grid:
    """Components as cells of a map.

    Attributes:
        layers, columns: Labels of the axes.
        column_axis: Name of the columns' axis.
        places: Row and column of each component.
    """

    layers: list[int]
    columns: list[str]
    column_axis: str
    places: list[tuple[int, int]]


def _grid_of(names: Sequence[str]) -> _Grid | None:
    """The map of these components; None unless each is a single part and they fill at least two layers and columns."""
    found = [_LABEL.fullmatch(name) for name in names]
    if not found or not all(found):
        return None
    parts = [match.groupdict() for match in found if match is not None]
    values, rests = {p["value"] for p in parts}, {p["rest"] for p in parts}
    if len(rests) > 1:
        return None
    by_head = all(p["head"] is not None for p in parts)
    if by_head and len(values) == 1:
        keys: list[Any] = [int(p["head"]) for p in parts]
        columns, axis = sorted(set(keys)), "head"
    else:
        endings = {value.rpartition("_")[2] for value in values}
        same = f"_{endings.pop()}" if len(endings) == 1 and len(values) > 1 else ""
        axis = f"part ({same[1:]})" if same else "part"
        keys = [p["value"].removesuffix(same) + (f" head {p['head']}" if p["head"] is not None else "") for p in parts]
        columns = list(dict.fromkeys(keys))
    layers = sorted({int(p["layer"]) for p in parts})
    places = [(layers.index(int(p["layer"])), columns.index(key)) for p, key in zip(parts, keys, strict=True)]
    if len(layers) < 2 or len(columns) < 2 or len(set(places)) < len(places) or (axis != "head" and len(columns) > 8):
        return None
    return _Grid(layers, [str(column) for column in columns], axis, places)


def _bars(
    names: Sequence[str], values: np.ndarray, change: np.ndarray, score: str, label: str, title: str | None
) -> go.Figure:
    rows = list(range(len(names)))
    most = float(np.nanmax(np.abs(change))) if len(rows) and not np.isnan(change).all() else 0.0
    cut = [shorten(name, _LABEL_COLUMNS) for name in names]
    figure = new_figure(title)
    figure.add_trace(
        go.Bar(
            x=change,
            y=rows,
            orientation="h",
            hovertext=[
                f"{escape(name)}<br>{escape(label)} {number(moved)}<br>{escape(score)} {number(value)}"
                for name, value, moved in zip(names, values, change, strict=True)
            ],
            hovertemplate="%{hovertext}<extra></extra>",
            marker={
                "color": change,
                "colorscale": DIVERGING,
                "reversescale": True,
                "cmin": -(most or 1.0),
                "cmax": most or 1.0,
            },
        )
    )
    every = number_ticks(rows, _BAR)["tickvals"]
    figure.update_yaxes(
        tickmode="array",
        tickvals=every,
        ticktext=[escape(cut[i]) for i in every],
        tickfont={"family": MONO, "size": 11},
        showgrid=False,
        zeroline=False,
        automargin=True,
        range=[len(rows) - 0.5, -0.5],
    )
    figure.update_xaxes(title_text=escape(label), zeroline=True)
    left = max((label_pixels([name]) if len(name) <= 18 else round(len(name) * 6.7) + 8) for name in cut or [""])
    return fit(figure, width=420, height=max(len(rows) * _BAR, 60), left=left + 16, bottom=64, right=40)
