"""Heat maps of a sweep: layer × position, layer × head, or any two labelled axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from nnterp.display import _adapt
from nnterp.display._arrays import as_array, number
from nnterp.display._cell_text import cell_text, inks
from nnterp.display._grid import Cells, check_same, fit, label_pixels, number_ticks, token_ticks
from nnterp.display._text import as_names, escape
from nnterp.display._theme import DIVERGING, MONO, new_figure, shown
from nnterp.token_text import shorten

_NUMBERS_UP_TO = 24


def plot_patching(
    scores: Any,
    columns: Sequence[Any] | None = None,
    tokenizer: Any = None,
    *,
    layers: Sequence[Any] | None = None,
    column_axis: str = "position (token)",
    score: str = "score",
    title: str | None = None,
    show: bool = False,
    **choose: Any,
) -> go.Figure:
    """A sweep's score in each cell, layer up and position (or head, or neuron) across; white is no effect.

    Args:
        scores: `[layers, columns]`, or the result object of a sweep of `nnterp.interventions`.
        columns: Labels of the columns: tokens (ids or texts) or heads; 0, 1, … if None.
        tokenizer: Names tokens that are given as ids.
        layers: Labels of the rows; 0, 1, … if None.
        column_axis: Name of the columns' axis.
        score: What the score is, with its unit ("normalised logit difference").
        title: Plain text.
        show: Also show the figure, in a notebook or a browser.
        **choose: For a result object with more axes than two, which label to draw, by the axis' name
            (`values="layers_output"`), or "mean" to average over it (`prompts="mean"`).

    Returns:
        The figure, coloured from −m to m around zero, with the numbers in the cells up to 24 × 24 of them.

    Raises:
        ValueError: Labels do not fit their axis, or the result has an axis too many and none of it was chosen.
    """
    if not _adapt.is_numbers(scores):
        scores, own = _adapt.sweep(scores, choose)
        columns = own["columns"] if columns is None else columns
        layers = own["layers"] if layers is None else layers
        column_axis, score = own["column_axis"], own["score"] if score == "score" else score
        title = own["title"] if title is None else title
    elif choose:
        raise TypeError(
            f"plot_patching() has no argument {next(iter(choose))!r}; axes are chosen of a result object only."
        )
    cells = as_array(scores, "scores ([layers, columns])", 2)
    rows, count = cells.shape
    names = [str(i) for i in range(count)] if columns is None else _column_names(columns, tokenizer, column_axis)
    check_same("columns", len(names), count, "the second axis of scores")
    row_names = [str(i) for i in range(rows)] if layers is None else [str(layer) for layer in layers]
    check_same("layers", len(row_names), rows, "the first axis of scores")

    most = float(np.nanmax(np.abs(cells))) if not np.isnan(cells).all() else 1.0
    written = rows <= _NUMBERS_UP_TO and count <= _NUMBERS_UP_TO
    size = Cells(46, 24, 11) if written else Cells(max(min(1400 // count, 30), 16), max(min(900 // rows, 24), 14), 11)
    tokens = "token" in column_axis
    if written and not tokens:
        size = Cells(46, 24, 11)
    unit = column_axis.split(" ")[0]
    figure = new_figure(title)
    figure.add_trace(
        go.Heatmap(
            z=cells,
            hovertext=[
                [
                    f"layer {escape(row_names[i])}<br>{unit} {_place(tokens, j, names[j])}"
                    f"<br>{escape(score)} {number(cells[i, j])}"
                    for j in range(count)
                ]
                for i in range(rows)
            ],
            hovertemplate="%{hovertext}<extra></extra>",
            hoverongaps=False,
            colorscale=DIVERGING,
            reversescale=True,
            zmin=-(most or 1.0),
            zmax=most or 1.0,
            xgap=1,
            ygap=1,
            colorbar={"title": {"text": escape(score)}, "thickness": 14},
        )
    )
    if written:
        texts = [[_written(value) for value in row] for row in cells]
        ink = inks((cells / (most or 1.0) + 1) / 2, DIVERGING, reverse=True)
        figure.add_trace(cell_text(texts, ink, size.font, mono=False))
    if tokens:
        ticks = token_ticks(names, size.width, min(11, size.width - 4))
    else:
        ticks = number_ticks(names, size.width)
        ticks["tickfont"] = {"family": MONO, "size": 11}
    figure.update_xaxes(**ticks, title_text=escape(column_axis), range=[-0.5, count - 0.5])
    figure.update_yaxes(**number_ticks(row_names, size.height), title_text="layer", range=[-0.5, rows - 0.5])
    below = label_pixels(names) if ticks.get("tickangle") else 24
    return shown(
        fit(
            figure,
            width=count * size.width,
            height=rows * size.height,
            left=44 + label_pixels(row_names),
            bottom=below + 44,
            right=124,
        ),
        show,
    )


def _column_names(columns: Sequence[Any], tokenizer: Any, column_axis: str) -> list[str]:
    if "token" in column_axis:
        return as_names(columns, tokenizer)
    return [str(column) for column in columns]


def _place(tokens: bool, index: int, name: str) -> str:
    return f"{index}  {escape(shorten(name, 40))}" if tokens else escape(name)


def _written(value: float) -> str:
    """A score in its cell: two decimals, no sign on what rounds to nothing."""
    if value != value:
        return ""
    text = f"{value:.2f}"
    return text.replace("-", "" if float(text) == 0 else "−")
