"""What a patchscope reads out: a table of layers by sources."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from nnterp.display._cell_text import inks
from nnterp.display._grid import axis_labels, table_row
from nnterp.display._patchscope_cells import patchscope_cells
from nnterp.display._text import escape
from nnterp.display._theme import MONO, MONO_WIDTH, SEQUENTIAL, new_figure, shown
from nnterp.token_text import visible, width

_FONT = 12


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
    """A table of layers by sources: the next tokens that the target prompt predicts (Ghandeharioun et al. 2024).

    Args:
        readings: Probabilities `[sources, layers, vocab]` (`[layers, vocab]` for one source) as `patchscope_lens`
            returns, generated texts by source and layer (`readings[source][layer]`), or a result object.
        tokenizer: Names the tokens; without one, ids are shown.
        sources: Labels of the columns; 0, 1, … if None.
        layers: Labels of the rows; 0, 1, … if None.
        top_k: Tokens in a cell, with their probabilities; if None, 3 with up to 24 layers and 1 with more.
        title: Plain text.
        show: Also show the figure, in a notebook or a browser.

    Returns:
        The figure; cells are shaded by the probability of their first token.

    Raises:
        ValueError: `readings` are no probabilities, or labels do not fit their axis.
        TypeError: `readings` are neither numbers, nor texts, nor a result.
    """
    cells = patchscope_cells(readings, tokenizer, top_k)
    headings = axis_labels(
        "sources", cells.sources if sources is None else sources, len(cells.lines), "the source axis of readings"
    )
    row_names = axis_labels(
        "layers", cells.layers if layers is None else layers, len(cells.lines[0]), "the layer axis of readings"
    )
    return shown(_draw(cells.lines, cells.shades, headings, row_names, cells.title if title is None else title), show)


def _draw(
    cells: list[list[list[str]]],
    shades: np.ndarray | None,
    headings: list[str],
    row_names: list[str],
    title: str | None,
) -> go.Figure:
    rows = len(row_names)
    columns = [_column(heading, column) for heading, column in zip(headings, cells, strict=True)]
    wrapped, pixels = [lines for lines, _ in columns], [width for _, width in columns]
    first = max(round(max(width(name) for name in [*row_names, "layer"]) * 8) + 24, 58)
    head_height = table_row(max(len(lines) for lines in wrapped), _FONT)
    tall = [max(len(column[i]) for column in cells) for i in range(rows)]
    fills, ink = _shading(shades, len(cells), rows)
    body = [[escape(name) for name in row_names], *([_lines(cell) for cell in column] for column in cells)]
    align = ["right", *["left"] * len(cells)]
    figure = new_figure(title)
    figure.add_trace(
        go.Table(
            columnwidth=[first, *pixels],
            header={
                "values": ["layer", *map(_lines, wrapped)],
                "align": align,
                "height": head_height,
                "font": {"size": _FONT},
            },
            cells={
                "values": body,
                "align": align,
                "height": table_row(min(tall), _FONT),
                "font": {"family": MONO, "size": _FONT, **({"color": ink} if ink else {})},
                **({"fill": {"color": fills}} if fills else {}),
            },
        )
    )
    top = 64 if title else 16
    return figure.update_layout(
        width=first + sum(pixels) + 32,
        height=top + head_height + sum(table_row(lines, _FONT) for lines in tall) + 28,
        margin={"l": 16, "r": 16, "t": top, "b": 16},
    )


def _column(heading: str, cells: list[list[str]]) -> tuple[list[str], int]:
    """The wrapped heading of one source's column, and the column's width in pixels."""
    longest = max(width(line) for cell in cells for line in cell)
    characters = min(max(longest, min(width(heading), 28), 8), 44)
    lines = textwrap.wrap(visible(heading).replace("·", " "), characters) or [""]
    return lines, round((characters + 2) * _FONT * MONO_WIDTH) + 12


def _lines(lines: list[str]) -> str:
    return "<br>".join(escape(line) for line in lines)


def _shading(
    shades: np.ndarray | None, columns: int, rows: int
) -> tuple[list[list[str]] | None, list[list[str]] | None]:
    """Fill and text colour of each cell, the column of row labels first; None and None without shades."""
    if shades is None:
        return None, None
    fills: list[list[str]] = [["rgba(127,127,127,0.12)"] * rows]
    text: list[list[str]] = [["#808890"] * rows]
    for column in range(columns):
        colours = sample_colorscale(SEQUENTIAL, [min(max(float(np.nan_to_num(v)), 0.0), 1.0) for v in shades[column]])
        fills.append(list(colours))
        text.append(inks(shades[column], SEQUENTIAL).tolist())
    return fills, text
