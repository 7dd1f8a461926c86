"""Heat maps of a sweep: layer × position, layer × head, or any two labelled axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from nnterp.display._arrays import as_array, number
from nnterp.display._cell_text import cell_text, inks
from nnterp.display._grid import Cells, axis_labels, check_same, fit, label_pixels, number_ticks, token_ticks
from nnterp.display._patching_cells import cells_of_sweep
from nnterp.display._results import is_numbers, refuse_choices
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
    prompt: int | None = None,
    title: str | None = None,
    show: bool = False,
    **choose: Any,
) -> go.Figure:
    """The score of a sweep in each cell, layer up and position (or head, or neuron) across; zero is white.

    Args:
        scores: `[layers, columns]`, or the result object of a sweep of `nnterp.interventions`.
        columns: Labels of the columns: tokens (ids or texts) or heads; 0, 1, … if None.
        tokenizer: Names tokens that are given as ids.
        layers: Labels of the rows; 0, 1, … if None.
        column_axis: Name of the columns' axis.
        score: What the score is, with its unit ("normalised logit difference").
        prompt: For a result of several prompts, the index of the one to draw.
        title: Plain text.
        show: Also show the figure, in a notebook or a browser.
        **choose: For a result object with more axes than two, which label to draw, by the axis' name
            (`values="layers_output"`), or "mean" to average over it (`prompts="mean"`). Positions are averaged over
            prompts only where they are the same place in each: columns selected by text or as the last token, or
            prompts of one template (equally many tokens, which differ only in the template's slots). Hovering says how
            many prompts a mean is of, and so does the label of a column that some prompts have no score for.

    Returns:
        The figure, coloured from −m to m around zero, with the numbers in the cells up to 24 × 24 of them.

    Raises:
        ValueError: Labels do not fit their axis, or another axis of the result has several labels and none was chosen,
            or positions are not the same places in the prompts whose mean was asked for.
        IndexError: The result has no prompt `prompt`.
        TypeError: `scores` are neither numbers nor a result.
    """
    counts, prompts = None, 0
    if not is_numbers(scores):
        own = cells_of_sweep(scores, choose, prompt)
        counts, prompts = own.counts, own.prompts
        scores, column_axis = own.scores, own.column_axis
        columns = own.columns if columns is None else columns
        layers = own.layers if layers is None else layers
        score = own.score if score == "score" else score
        title = own.title if title is None else title
    else:
        refuse_choices("plot_patching", choose if prompt is None else {"prompt": prompt})
    cells = as_array(scores, "scores ([layers, columns])", 2)
    rows, count = cells.shape
    names = [str(i) for i in range(count)] if columns is None else _column_names(columns, tokenizer, column_axis)
    check_same("columns", len(names), count, "the second axis of scores")
    row_names = axis_labels("layers", layers, rows, "the first axis of scores")
    hover = _hover(cells, names, row_names, column_axis, score)
    if counts is not None:
        hover = [
            [f"{text}<br>mean of {n} of {prompts} prompts" for text, n in zip(texts, row, strict=True)]
            for texts, row in zip(hover, counts, strict=True)
        ]
        most = counts.max(0)
        names = [name if n == prompts else f"({n}/{prompts}) {name}" for name, n in zip(names, most, strict=True)]
    return shown(_draw(cells, names, row_names, hover, column_axis, score, title), show)


def _draw(
    cells: np.ndarray,
    names: list[str],
    row_names: list[str],
    hover: list[list[str]],
    column_axis: str,
    score: str,
    title: str | None,
) -> go.Figure:
    rows, count = cells.shape
    written = rows <= _NUMBERS_UP_TO and count <= _NUMBERS_UP_TO
    size = Cells(46, 24, 11) if written else Cells(max(min(1400 // count, 30), 16), max(min(900 // rows, 24), 14), 11)
    most = (float(np.nanmax(np.abs(cells))) if not np.isnan(cells).all() else 1.0) or 1.0
    figure = new_figure(title)
    figure.add_trace(
        go.Heatmap(
            z=cells,
            hovertext=hover,
            hovertemplate="%{hovertext}<extra></extra>",
            hoverongaps=False,
            colorscale=DIVERGING,
            reversescale=True,
            zmin=-most,
            zmax=most,
            xgap=1,
            ygap=1,
            colorbar={"title": {"text": escape(score)}, "thickness": 14},
        )
    )
    if written:
        texts = [[_written(value) for value in row] for row in cells]
        figure.add_trace(cell_text(texts, inks((cells / most + 1) / 2, DIVERGING, reverse=True), size.font, mono=False))
    if _are_tokens(column_axis):
        ticks = token_ticks(names, size.width, min(11, size.width - 4))
    else:
        ticks = {**number_ticks(names, size.width), "tickfont": {"family": MONO, "size": 11}}
    figure.update_xaxes(**ticks, title_text=escape(column_axis), range=[-0.5, count - 0.5])
    figure.update_yaxes(**number_ticks(row_names, size.height), title_text="layer", range=[-0.5, rows - 0.5])
    return fit(
        figure,
        width=count * size.width,
        height=rows * size.height,
        left=44 + label_pixels(row_names),
        bottom=(label_pixels(names) if ticks.get("tickangle") else 24) + 44,
        right=124,
    )


def _hover(cells: np.ndarray, names: list[str], row_names: list[str], column_axis: str, score: str) -> list[list[str]]:
    unit, tokens = column_axis.split(" ")[0], _are_tokens(column_axis)
    places = [f"{j}  {escape(shorten(name, 40))}" if tokens else escape(name) for j, name in enumerate(names)]
    return [
        [
            f"layer {escape(row_name)}<br>{unit} {place}<br>{escape(score)} {number(value)}"
            for place, value in zip(places, row, strict=True)
        ]
        for row_name, row in zip(row_names, cells, strict=True)
    ]


def _are_tokens(column_axis: str) -> bool:
    """True if the columns are labelled by tokens."""
    return "token" in column_axis


def _column_names(columns: Sequence[Any], tokenizer: Any, column_axis: str) -> list[str]:
    if _are_tokens(column_axis):
        return as_names(columns, tokenizer)
    return [str(column) for column in columns]


def _written(value: float) -> str:
    """A score as it is written in its cell: two decimals, without a sign if it rounds to zero."""
    if value != value:
        return ""
    text = f"{value:.2f}"
    return text.replace("-", "" if float(text) == 0 else "−")
