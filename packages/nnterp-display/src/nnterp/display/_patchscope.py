"""A patchscope's readings as a table of layers by sources."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from nnterp.display._arrays import as_array, axis_labels, check_probabilities
from nnterp.display._cell_text import inks
from nnterp.display._grid import table_row
from nnterp.display._results.labelled import is_numbers
from nnterp.display._results.patchscope import readings as readings_of
from nnterp.display._text import escape
from nnterp.display._theme import MONO, MONO_WIDTH, SEQUENTIAL, new_figure, shown
from nnterp.indices import integer
from nnterp.token_text import TokenNames, shorten, visible, width

_FONT = 12
_NAME = 24  # longer tokens are cut
_FEW_LAYERS = 24

Lines = list[list[list[str]]]
"""Lines of text in each cell, `[sources][layers][lines]`."""


def plot_patchscope(
    readings: Any,
    tokenizer: Any = None,
    *,
    sources: Sequence[str] | None = None,
    layers: Sequence[Any] | None = None,
    top_k: int | None = None,
    title: str | None = None,
    show: bool = False,
) -> go.Figure:
    """A table of layers by sources: the tokens that the target prompt predicts next (Ghandeharioun et al. 2024).

    Args:
        readings: Probabilities `[sources, layers, vocab]` (`[layers, vocab]` for one source) as `patchscope_lens`
            returns, generated texts by source and layer (`readings[source][layer]`), or the result of a patchscope.
        tokenizer: Names the tokens; without one, ids are shown.
        sources: Labels of the columns; 0, 1, … if None.
        layers: Labels of the rows; 0, 1, … if None.
        top_k: Tokens in a cell, with their probabilities. If None, 3 for up to 24 layers and 1 for more.
        title: Plain text.
        show: Also show the figure, in a notebook or a browser.

    Returns:
        The figure, the last layer on top; cells are shaded by the probability of their first token.

    Raises:
        ValueError: `readings` does not hold probabilities, labels do not fit their axis, or a result holds fewer tokens
            than `top_k`.

    Example:
        figure = display.plot_patchscope(patchscope_table(model, "The capital of France", repeat_prompt()))
    """
    if not is_numbers(readings):
        read = readings_of(readings, tokenizer)
        kept = _shown_tokens(top_k, len(read.layers))
        if top_k is not None and kept > (held := read.probabilities.shape[-1]):
            raise ValueError(f"This result holds the {held} top tokens of each reading, not {kept}.")
        texts = [[cell[:kept] for cell in column] for column in read.texts]
        cells, shades = _ranked_lines(texts, read.probabilities), read.probabilities[..., 0]
        title = read.title if title is None else title
        sources = read.sources if sources is None else sources
        layers = read.layers if layers is None else layers
    elif _is_texts(readings):
        cells, shades = [[_wrap(text) for text in column] for column in readings], None
    else:
        texts, best = _top(readings, tokenizer, top_k)
        cells, shades = _ranked_lines(texts, best), best[..., 0]
    columns, rows = len(cells), len(cells[0])
    if any(len(column) != rows for column in cells):
        raise ValueError(f"Each source needs one reading per layer; they have {[len(column) for column in cells]}.")
    headings = axis_labels(sources, columns, "sources", "the source axis of readings")
    row_names = axis_labels(layers, rows, "layers", "the layer axis of readings")
    cells, row_names = [column[::-1] for column in cells], row_names[::-1]  # the last layer on top, as in every figure
    shades = None if shades is None else shades[:, ::-1]
    return shown(_draw(_lay_out(cells, headings, row_names), cells, shades, title), show)


def _is_texts(readings: Any) -> bool:
    """True for lists of lists of texts, none of them empty."""
    return (
        isinstance(readings, (list, tuple))
        and bool(readings)
        and all(
            isinstance(column, (list, tuple)) and column and all(isinstance(text, str) for text in column)
            for column in readings
        )
    )


def _wrap(text: str) -> list[str]:
    return textwrap.wrap(visible(text).replace("·", " "), 36) or ["⟨empty⟩"]


def _shown_tokens(top_k: int | None, layers: int) -> int:
    """How many tokens a cell shows."""
    return (3 if layers <= _FEW_LAYERS else 1) if top_k is None else max(integer(top_k, "top_k"), 1)


def _top(readings: Any, tokenizer: Any, top_k: int | None) -> tuple[list[list[list[str]]], np.ndarray]:
    """Of `[sources, layers, vocab]`, the names `[sources][layers][k]` of the top tokens, and their probabilities."""
    probs = as_array(readings, "readings ([sources, layers, vocab])", 2, 3)
    probs = probs[None] if probs.ndim == 2 else probs
    check_probabilities(probs, "readings")
    order = np.argsort(-probs, axis=-1, kind="stable")[..., : _shown_tokens(top_k, probs.shape[1])]
    names = TokenNames(tokenizer)
    return [[names.many(ids) for ids in column] for column in order], np.take_along_axis(probs, order, -1)


def _ranked_lines(texts: Sequence[Sequence[Sequence[str]]], probabilities: np.ndarray) -> Lines:
    """A line for each token with its probability `[sources, layers, k]`, all probabilities in one column."""
    longest = max(width(shorten(text, _NAME)) for column in texts for cell in column for text in cell)

    def line(text: str, value: float) -> str:
        name = shorten(text, _NAME)
        return f"{name}{' ' * (longest - width(name))} {value:.2f}"

    return [
        [[line(text, probabilities[i, j, k]) for k, text in enumerate(cell)] for j, cell in enumerate(column)]
        for i, column in enumerate(texts)
    ]


@dataclass(frozen=True)
class _Layout:
    """Texts and sizes of the table's parts.

    Attributes:
        headings: Lines of text above each source.
        rows: Labels of the rows.
        widths: Pixels of each column, that of the labels first.
        lines: Lines of text in each row.
    """

    headings: list[list[str]]
    rows: list[str]
    widths: list[int]
    lines: list[int]

    @property
    def heading_height(self) -> int:
        return table_row(max(len(lines) for lines in self.headings), _FONT)

    @property
    def height(self) -> int:
        return self.heading_height + sum(table_row(lines, _FONT) for lines in self.lines)


def _lay_out(cells: Lines, headings: list[str], row_names: list[str]) -> _Layout:
    widths = [max(round(max(width(name) for name in [*row_names, "layer"]) * 8) + 24, 58)]
    wrapped = []
    for heading, column in zip(headings, cells, strict=True):
        longest = max(width(line) for cell in column for line in cell)
        columns = min(max(longest, min(width(heading), 28), 8), 44)
        wrapped.append(textwrap.wrap(visible(heading).replace("·", " "), columns) or [""])
        widths.append(round((columns + 2) * _FONT * MONO_WIDTH) + 12)
    lines = [max(len(column[i]) for column in cells) for i in range(len(row_names))]
    return _Layout(wrapped, row_names, widths, lines)


def _draw(layout: _Layout, cells: Lines, shades: np.ndarray | None, title: str | None) -> go.Figure:
    align = ["right", *["left"] * len(cells)]
    body = [[escape(name) for name in layout.rows], *([_cell(cell) for cell in column] for column in cells)]
    colours: dict[str, Any] = {}
    font: dict[str, Any] = {"family": MONO, "size": _FONT}
    if shades is not None:
        fills, font["color"] = _shading(shades)
        colours["fill"] = {"color": fills}
    figure = new_figure(title)
    figure.add_trace(
        go.Table(
            columnwidth=layout.widths,
            header={
                "values": ["layer", *(_cell(lines) for lines in layout.headings)],
                "align": align,
                "height": layout.heading_height,
                "font": {"size": _FONT},
            },
            cells={
                "values": body,
                "align": align,
                "height": table_row(min(layout.lines), _FONT),
                "font": font,
                **colours,
            },
        )
    )
    top = 64 if title else 16
    return figure.update_layout(
        width=sum(layout.widths) + 32,
        height=top + layout.height + 28,
        margin={"l": 16, "r": 16, "t": top, "b": 16},
    )


def _cell(lines: list[str]) -> str:
    return "<br>".join(escape(line) for line in lines)


def _shading(shades: np.ndarray) -> tuple[list[list[str]], list[list[str]]]:
    """Colours of the cells and of the texts in them, by column, that of the row labels first."""
    rows = shades.shape[1]
    fills: list[list[str]] = [["rgba(127,127,127,0.12)"] * rows]
    texts: list[list[str]] = [["#808890"] * rows]
    for column in shades:
        levels = [min(max(float(np.nan_to_num(value)), 0.0), 1.0) for value in column]
        fills.append(list(sample_colorscale(SEQUENTIAL, levels)))
        texts.append(inks(column, SEQUENTIAL).tolist())
    return fills, texts
