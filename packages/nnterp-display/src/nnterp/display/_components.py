"""How much a score changes with each component: ablations and patched paths, as a map or as bars."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go

from nnterp.display._arrays import as_array, axis_labels, number
from nnterp.display._grid import fit, label_pixels, number_ticks
from nnterp.display._patching import plot_patching
from nnterp.display._results.components import component_scores
from nnterp.display._results.labelled import is_numbers
from nnterp.display._results.picking import refuse_choice
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
    title: str | None = None,
    prompt: int | None = None,
    show: bool = False,
    **choose: Any,
) -> go.Figure:
    """How much a score changes when each component is ablated, or its path patched.

    Single heads of several layers are drawn as a map, layer up and head across; so are whole parts of several layers, a
    column for each kind of part. Other components are drawn as bars, in their order from the top.

    Args:
        scores: `[components]`, or the result of `ablate` or `path_patching` of `nnterp.interventions`.
        components: Their names; 0, 1, … if None.
        baseline: The score when nothing is changed; 0 if None. A result has its own.
        score: What the score is, with its unit ("logit difference").
        title: Plain text.
        prompt: For a result of several prompts, which one to draw, by its index.
        show: Also show the figure, in a notebook or a browser.
        **choose: For a result of several prompts, which one to draw by its text (`prompts="..."`), or `prompts="mean"`.

    Returns:
        The figure, of the changes from the baseline, coloured from −m to m around zero.

    Raises:
        ValueError: There is not one name for each score, or the result has several prompts and none was chosen.
        IndexError: There is no such prompt.

    Example:
        figure = display.plot_components(ablate(model, prompts[0], components(model, "mlps_output"), "zero"))
    """
    if is_numbers(scores):
        refuse_choice("plot_components", choose, prompt)
        values = as_array(scores, "scores ([components])", 1)
        changes = values - (0.0 if baseline is None else baseline)
    else:
        read = component_scores(scores, choose, prompt)
        values, changes = read.values, read.changes
        components = read.components if components is None else components
        score = read.score if score == "score" else score
        title = read.title if title is None else title
    names = axis_labels(components, len(values), "components", "scores")
    placed = _map_of(names)
    if placed is None:
        label = f"change of {score}"
        details = [
            f"{label} {number(change)}\n{score} {number(value)}" for value, change in zip(values, changes, strict=True)
        ]
        return shown(bars(names, changes, label, title, details), show)
    cells = np.full((len(placed.layers), len(placed.columns)), np.nan)
    for place, change in zip(placed.places, changes, strict=True):
        cells[place] = change
    return plot_patching(
        cells,
        placed.columns,
        layers=placed.layers,
        column_axis=placed.column_axis,
        score=f"change of {score}",
        title=title,
        show=show,
    )


@dataclass(frozen=True)
class _ComponentMap:
    """Components as cells of a map: labels of the axes, and each component's row and column."""

    layers: list[int]
    columns: list[str]
    column_axis: str
    places: list[tuple[int, int]]


def _map_of(names: Sequence[str]) -> _ComponentMap | None:
    """The map that these components make; None if they have to be bars.

    They make a map if each name is one part (or head) of one layer, no two fall in the same cell, and there are two
    layers and two columns at least. Columns are heads, or up to 8 kinds of parts.
    """
    found = [_LABEL.fullmatch(name) for name in names]
    parts = [match.groupdict() for match in found if match is not None]
    if not parts or len(parts) < len(names) or len({part["rest"] for part in parts}) > 1:
        return None
    keys, axis = _columns_of(parts)
    columns = sorted(set(keys)) if axis == "head" else list(dict.fromkeys(keys))
    layers = sorted({int(part["layer"]) for part in parts})
    places = [(layers.index(int(part["layer"])), columns.index(key)) for part, key in zip(parts, keys, strict=True)]
    if len(layers) < 2 or len(columns) < 2 or len(set(places)) < len(places) or (axis != "head" and len(columns) > 8):
        return None
    return _ComponentMap(layers, [str(column) for column in columns], axis, places)


def _columns_of(parts: Sequence[dict[str, Any]]) -> tuple[list[Any], str]:
    """For each component the column it belongs to, and the title of that axis."""
    values = {part["value"] for part in parts}
    if len(values) == 1 and all(part["head"] is not None for part in parts):
        return [int(part["head"]) for part in parts], "head"
    endings = {value.rpartition("_")[2] for value in values}
    same = f"_{endings.pop()}" if len(endings) == 1 and len(values) > 1 else ""
    keys = [
        part["value"].removesuffix(same) + (f" head {part['head']}" if part["head"] is not None else "")
        for part in parts
    ]
    return keys, f"part ({same[1:]})" if same else "part"


def bars(names: Sequence[str], changes: np.ndarray, label: str, title: str | None, details: Sequence[str]) -> go.Figure:
    """A bar for each named number, the first at the top, coloured from −m to m around zero.

    Args:
        names: Their names.
        changes: The numbers.
        label: What they are.
        title: Plain text.
        details: What hovering says below each name, plain text in lines.
    """
    limit = float(np.nanmax(np.abs(changes))) or 1.0 if not np.isnan(changes).all() else 1.0
    hover = ["<br>".join(map(escape, (name, *detail.split("\n")))) for name, detail in zip(names, details, strict=True)]
    colours = {"color": changes, "colorscale": DIVERGING, "reversescale": True, "cmin": -limit, "cmax": limit}
    figure = new_figure(title)
    figure.add_trace(
        go.Bar(
            x=changes,
            y=list(range(len(names))),
            orientation="h",
            hovertext=hover,
            hovertemplate="%{hovertext}<extra></extra>",
            marker=colours,
        )
    )
    labels = [shorten(name, _LABEL_COLUMNS) for name in names]
    kept = number_ticks(labels, _BAR)["tickvals"]
    figure.update_yaxes(
        tickmode="array",
        tickvals=kept,
        ticktext=[escape(labels[i]) for i in kept],
        tickfont={"family": MONO, "size": 11},
        showgrid=False,
        zeroline=False,
        automargin=True,
        range=[len(names) - 0.5, -0.5],
    )
    figure.update_xaxes(title_text=escape(label), zeroline=True)
    left = max(label_pixels([text]) if len(text) <= 18 else round(len(text) * 6.7) + 8 for text in labels)
    return fit(figure, width=420, height=max(len(names) * _BAR, 60), left=left + 16, bottom=64, right=40)
