"""Scores of heads, as a heat map of layers × heads, with the null control."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from nnterp.display._arrays import as_array, axis_labels, number
from nnterp.display._grid import Cells, fit, label_pixels, number_ticks
from nnterp.display._results.heads import Heads, head_scores
from nnterp.display._results.labelled import is_numbers
from nnterp.display._text import escape
from nnterp.display._theme import SEQUENTIAL, new_figure, shown

_CELL = 26  # pixels, at most


def plot_heads(
    scores: Any,
    *,
    tensor: str | None = None,
    layers: Sequence[Any] | None = None,
    heads: Sequence[Any] | None = None,
    threshold: float = 0.1,
    deviations: float = 3.0,
    title: str | None = None,
    show: bool = False,
) -> go.Figure:
    """A heat map of the score of each head; a ring marks the heads that are above the null control.

    Args:
        scores: `[layers, heads]`, or the result of `nnterp.interventions.head_scores`.
        tensor: The tensor of a result to draw: "scores", "control", "attention", ...; "scores" if None.
        layers, heads: Labels; 0, 1, … if None.
        threshold, deviations: A head gets a ring if its score exceeds the control's mean by at least `threshold`, and
            by at least `deviations` standard deviations of the control: as in `HeadScores.heads`. Plain tensors have
            no control, so no rings.
        title: Plain text.
        show: Also show the figure, in a notebook or a browser.

    Returns:
        The figure, layer 0 at the bottom, coloured from 0 to the largest score. Hovering says score and control.

    Raises:
        ValueError: Labels do not fit their axis, or a result has no such tensor over layers and heads.

    Example:
        >>> from nnterp import display
        >>> figure = display.plot_heads([[0.1, 0.9], [0.0, 0.3]])
        >>> float(figure.data[0].zmax)
        0.9
    """
    if is_numbers(scores):
        given = as_array(scores, "scores ([layers, heads])", 2)
        read = Heads(given, None, None, None, None, "score", None)
    else:
        read = head_scores(scores, tensor)
    rows = axis_labels(read.layers if layers is None else layers, read.scores.shape[0], "layers", "the layer axis")
    columns = axis_labels(read.heads if heads is None else heads, read.scores.shape[1], "heads", "the head axis")
    figure = new_figure(read.title if title is None else title)
    width = max(min(1000 // len(columns), _CELL), 12)
    size = Cells(width, max(min(900 // len(rows), _CELL), 12), 11)
    figure.add_trace(_heatmap(read, rows, columns))
    if read.control is not None:
        figure.add_trace(_rings(read, threshold, deviations, size))
    figure.update_xaxes(**number_ticks(columns, size.width), title_text="head", range=[-0.5, len(columns) - 0.5])
    figure.update_yaxes(**number_ticks(rows, size.height), title_text="layer", range=[-0.5, len(rows) - 0.5])
    return shown(
        fit(
            figure,
            width=len(columns) * size.width,
            height=len(rows) * size.height,
            left=44 + label_pixels(rows),
            bottom=64,
            right=124,
        ),
        show,
    )


def _heatmap(read: Heads, rows: list[str], columns: list[str]) -> go.Heatmap:
    low, high = (0.0, 1.0) if np.isnan(read.scores).all() else (np.nanmin(read.scores), np.nanmax(read.scores))
    return go.Heatmap(
        z=read.scores,
        hovertext=[[_hover(read, i, j, rows, columns) for j in range(len(columns))] for i in range(len(rows))],
        hovertemplate="%{hovertext}<extra></extra>",
        hoverongaps=False,
        colorscale=SEQUENTIAL,
        zmin=min(0.0, float(low)),
        zmax=float(high) if high > 0 else 1.0,
        xgap=1,
        ygap=1,
        colorbar={"title": {"text": escape(read.score)}, "thickness": 14},
    )


def _hover(read: Heads, i: int, j: int, rows: list[str], columns: list[str]) -> str:
    lines = [f"layer {escape(rows[i])}, head {escape(columns[j])}", f"{escape(read.score)} {number(read.scores[i, j])}"]
    if read.control is not None and read.control_std is not None:
        lines.append(f"control {number(read.control[i, j])} ± {number(read.control_std[i, j])}")
    return "<br>".join(lines)


def _rings(read: Heads, threshold: float, deviations: float, size: Cells) -> go.Scatter:
    """A ring around each head that is beyond the control."""
    assert read.control is not None
    assert read.control_std is not None
    above = read.scores - read.control
    down, across = np.nonzero((above >= threshold) & (above >= deviations * read.control_std))
    return go.Scatter(
        x=across,
        y=down,
        mode="markers",
        marker={
            "symbol": "circle-open",
            "size": max(min(size.width, size.height) - 6, 6),
            "color": "#D55E00",
            "line": {"width": 2},
        },
        hoverinfo="skip",
        showlegend=False,
        name="beyond the control",
    )
