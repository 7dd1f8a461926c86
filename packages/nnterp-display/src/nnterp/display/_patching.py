"""Heat maps of a sweep: layer × position, layer × head, or any two labelled axes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go

from nnterp.display._arrays import as_array, axis_labels, number
from nnterp.display._cell_text import cell_text, inks
from nnterp.display._grid import LABEL_COLUMNS, Cells, fit, label_pixels, number_ticks, token_ticks
from nnterp.display._results.labelled import is_numbers
from nnterp.display._results.patching import sweep
from nnterp.display._results.picking import refuse_choice
from nnterp.display._text import as_names, escape
from nnterp.display._theme import DIVERGING, MONO, new_figure, shown
from nnterp.token_text import shorten, width

_NUMBERS_UP_TO = 24
_WORD = 6  # longer labels than this are words, not numbers: they may have to be turned to fit


def plot_patching(
    scores: Any,
    columns: Sequence[Any] | None = None,
    tokenizer: Any = None,
    *,
    layers: Sequence[Any] | None = None,
    column_axis: str = "position (token)",
    score: str = "score",
    title: str | None = None,
    prompt: int | None = None,
    show: bool = False,
    **choose: Any,
) -> go.Figure:
    """A sweep's score in each cell, layer up and position (or head, or neuron) across; white is no effect.

    Args:
        scores: `[layers, columns]`, or the result of a sweep of `nnterp.interventions`.
        columns: Labels of the columns: tokens (ids or texts) or heads; 0, 1, … if None.
        tokenizer: Names tokens that are given as ids.
        layers: Labels of the rows; 0, 1, … if None.
        column_axis: Title of the columns' axis.
        score: What the score is, with its unit ("normalised logit difference").
        title: Plain text.
        prompt: For a result of several prompts, which one to draw, by its index.
        show: Also show the figure, in a notebook or a browser.
        **choose: For a result with more than two axes, the label to draw of each further axis, by the axis' name
            (`values="layers_output"`), or "mean" to average over it (`prompts="mean"`).

    Returns:
        The figure, coloured from −m to m around zero. Up to 24 × 24 cells have their numbers in them. For a mean over
        prompts, hovering says of how many; if that differs between columns, their labels say it too.

    Raises:
        ValueError: Labels do not fit their axis; a result has a further axis with several labels and none was chosen;
            or the mean over prompts was chosen, and the result's positions are not the same thing in each prompt (they
            are if they were found by selectors, or are the last token, or if the prompts have one template).
        IndexError: There is no such prompt.

    Example:
        metric = logit_difference(" Paris", " Rome")
        result = activation_patching(model, "The capital of France is", "The capital of Italy is", metric)
        figure = display.plot_patching(result.normalized())
    """
    prompts = None
    if not is_numbers(scores):
        read = sweep(scores, choose, prompt)
        prompts = read.prompts
        scores, column_axis = read.scores, read.column_axis
        columns = read.columns if columns is None else columns
        layers = read.layers if layers is None else layers
        score = read.score if score == "score" else score
        title = read.title if title is None else title
    else:
        refuse_choice("plot_patching", choose, prompt)
    cells = as_array(scores, "scores ([layers, columns])", 2)
    rows, count = cells.shape
    tokens = "token" in column_axis
    if columns is not None and tokens:
        columns = as_names(columns, tokenizer)
    names = axis_labels(columns, count, "columns", "the second axis of scores")
    row_names = axis_labels(layers, rows, "layers", "the first axis of scores")
    return shown(_draw(_Map(cells, row_names, names, column_axis, tokens, score, prompts), title), show)


@dataclass(frozen=True)
class _Map:
    """What the heat map shows: scores `[layers, columns]`, and the words around them.

    Attributes:
        cells: The scores.
        rows, columns: Labels of the axes.
        column_axis: Title of the axis of columns.
        tokens: Whether the columns are tokens.
        score: What the score is.
        prompts: `[layers, columns]`, how many prompts each score is the mean of; None if it is no mean.
    """

    cells: np.ndarray
    rows: list[str]
    columns: list[str]
    column_axis: str
    tokens: bool
    score: str
    prompts: np.ndarray | None = None

    @property
    def limit(self) -> float:
        """The largest magnitude of a score, 1 if there is none but 0 or NaN."""
        return float(np.nanmax(np.abs(self.cells))) or 1.0 if not np.isnan(self.cells).all() else 1.0

    @property
    def with_numbers(self) -> bool:
        """Whether there are few enough cells to write their scores in them."""
        return max(self.cells.shape) <= _NUMBERS_UP_TO

    @property
    def column_labels(self) -> list[str]:
        """The columns' labels on the axis, with their numbers of prompts if these differ."""
        counts = [] if self.prompts is None else self.prompts.max(0).tolist()
        if len(set(counts)) < 2:
            return self.columns
        ends = [f" (n={count})" for count in counts]
        return [shorten(name, LABEL_COLUMNS - len(end)) + end for name, end in zip(self.columns, ends, strict=True)]

    @property
    def size(self) -> Cells:
        rows, count = self.cells.shape
        if self.with_numbers:
            return Cells(46, 24, 11)
        return Cells(max(min(960 // count, 30), 14), max(min(900 // rows, 24), 14), 11)


def _draw(drawn: _Map, title: str | None) -> go.Figure:
    rows, count = drawn.cells.shape
    size = drawn.size
    figure = new_figure(title)
    figure.add_trace(_heatmap(drawn))
    if drawn.with_numbers:
        texts = [[_written(value) for value in row] for row in drawn.cells]
        ink = inks((drawn.cells / drawn.limit + 1) / 2, DIVERGING, reverse=True)
        figure.add_trace(cell_text(texts, ink, size.font, mono=False))
    labels = drawn.column_labels
    if drawn.tokens or max(map(width, labels)) > _WORD:
        ticks = token_ticks(labels, size.width, min(11, size.width - 4))
    else:
        ticks = {**number_ticks(labels, size.width), "tickfont": {"family": MONO, "size": 11}}
    figure.update_xaxes(**ticks, title_text=escape(drawn.column_axis), range=[-0.5, count - 0.5])
    figure.update_yaxes(**number_ticks(drawn.rows, size.height), title_text="layer", range=[-0.5, rows - 0.5])
    below = label_pixels(labels) if ticks.get("tickangle") else 24
    return fit(
        figure,
        width=count * size.width,
        height=rows * size.height,
        left=44 + label_pixels(drawn.rows),
        bottom=below + 44,
        right=124,
    )


def _heatmap(drawn: _Map) -> go.Heatmap:
    rows, count = drawn.cells.shape
    return go.Heatmap(
        z=drawn.cells,
        hovertext=[[_hover(drawn, i, j) for j in range(count)] for i in range(rows)],
        hovertemplate="%{hovertext}<extra></extra>",
        hoverongaps=False,
        colorscale=DIVERGING,
        reversescale=True,
        zmin=-drawn.limit,
        zmax=drawn.limit,
        xgap=1,
        ygap=1,
        colorbar={"title": {"text": escape(drawn.score)}, "thickness": 14},
    )


def _hover(drawn: _Map, i: int, j: int) -> str:
    name = drawn.columns[j]
    place = f"{j}  {escape(shorten(name, 40))}" if drawn.tokens else escape(name)
    lines = [
        f"layer {escape(drawn.rows[i])}",
        f"{drawn.column_axis.split(' ')[0]} {place}",
        f"{escape(drawn.score)} {number(drawn.cells[i, j])}",
    ]
    if drawn.prompts is not None:
        count = drawn.prompts[i, j]
        lines.append(f"mean of {count} prompt{'' if count == 1 else 's'}")
    return "<br>".join(lines)


def _written(value: float) -> str:
    """A score in its cell: two decimals, no sign if they are zero, "" for NaN."""
    if value != value:
        return ""
    text = f"{value:.2f}"
    return text.replace("-", "" if float(text) == 0 else "−")
