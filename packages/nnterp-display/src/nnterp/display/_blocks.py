"""Heat maps with a text in each cell, broken into blocks of columns, one below the other, so that they fit a page."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go

from nnterp.display._cell_text import cell_text
from nnterp.display._grid import Cells, fit, label_pixels, number_ticks, token_ticks, wrap_bar_title
from nnterp.display._theme import new_figure

_LEAST_BAR = 130  # pixels of a colour bar
_RIGHT = 110


@dataclass(frozen=True)
class BlockMap:
    """What is drawn.

    Attributes:
        z: `[rows, columns]`, what colours a cell.
        texts: `[rows][columns]`, the text of a cell, its lines divided by newlines.
        hover: `[rows][columns]`.
        inks: `[rows, columns]`, colours of the texts.
        rows: Labels of the rows, the first at the bottom.
        columns: Labels of the columns.
        row_axis, column_axis: Titles of the axes.
        scale: Settings of the heat map's colours, with `zmin` and `zmax`.
        bar: Settings of the colour bar.
        downward: Put the first row at the top.
    """

    z: np.ndarray
    texts: list[list[str]]
    hover: list[list[str]]
    inks: np.ndarray
    rows: list[str]
    columns: list[str]
    row_axis: str
    column_axis: str
    scale: dict[str, Any]
    bar: dict[str, Any]
    downward: bool = False


def draw_blocks(drawn: BlockMap, size: Cells, width: int, title: str | None) -> go.Figure:
    """The heat map in as many blocks as are needed for a figure of at most `width` pixels; each has a colour bar."""
    rows, columns = len(drawn.rows), len(drawn.columns)
    left = 44 + label_pixels(drawn.rows)
    most = max((width - left - _RIGHT) // size.width, 1)
    blocks = math.ceil(columns / most)
    each = math.ceil(columns / blocks)
    tall = rows * size.height
    below = label_pixels(drawn.columns) if token_ticks(drawn.columns, size.width)["tickangle"] else 24
    gap = below + 26
    inner = blocks * tall + (blocks - 1) * gap
    figure = new_figure(title)
    for block in range(blocks):
        some = slice(block * each, min((block + 1) * each, columns))
        bottom = inner - tall - block * (tall + gap)
        _add_block(figure, drawn, size, block, some, each, (bottom / inner, (bottom + tall) / inner))
    figure.update_xaxes(title_text=drawn.column_axis, selector={"anchor": _axis("y", blocks - 1)})
    figure = fit(figure, width=each * size.width, height=inner, left=left, bottom=below + 44, right=_RIGHT)
    if blocks > 1:
        _bar_for_each(figure, drawn, tall, tall + gap, inner)
    return figure


def _axis(letter: str, block: int) -> str:
    return f"{letter}{block + 1 if block else ''}"


def _add_block(
    figure: go.Figure,
    drawn: BlockMap,
    size: Cells,
    block: int,
    some: slice,
    each: int,
    domain: tuple[float, float],
) -> None:
    x, y = _axis("x", block), _axis("y", block)
    rows = len(drawn.rows)
    at = list(range(some.start, some.stop))
    figure.add_trace(
        go.Heatmap(
            z=drawn.z[:, some],
            x=at,
            y=list(range(rows)),
            hovertext=[row[some] for row in drawn.hover],
            hovertemplate="%{hovertext}<extra></extra>",
            hoverongaps=False,
            xgap=1,
            ygap=1,
            xaxis=x,
            yaxis=y,
            colorbar=drawn.bar,
            **drawn.scale,
        )
    )
    text = cell_text([row[some] for row in drawn.texts], drawn.inks[:, some], size.font)
    figure.add_trace(text.update(x=[at[j] for j in text.x], xaxis=x, yaxis=y))
    ticks = token_ticks(drawn.columns[some], size.width)
    ticks["tickvals"] = at
    ticks["tickangle"] = token_ticks(drawn.columns, size.width)["tickangle"]
    span = [-0.5, rows - 0.5]
    figure.layout[f"xaxis{x[1:]}"] = {**ticks, "anchor": y, "range": [at[0] - 0.5, at[0] + each - 0.5]}
    figure.layout[f"yaxis{y[1:]}"] = {
        **number_ticks(drawn.rows, size.height),
        "anchor": x,
        "domain": [max(domain[0], 0.0), min(domain[1], 1.0)],
        "title": {"text": drawn.row_axis},
        "range": span[::-1] if drawn.downward else span,
    }


def _bar_for_each(figure: go.Figure, drawn: BlockMap, tall: int, step: int, inner: int) -> None:
    """Put a colour bar beside each block; beside the first alone if blocks are too low for one."""
    for block, trace in enumerate(figure.select_traces({"type": "heatmap"})):
        if tall < _LEAST_BAR:
            trace.showscale = block == 0
            continue
        length = min(tall, 420)
        trace.colorbar.title.text = wrap_bar_title(drawn.bar["title"]["text"], length)
        trace.colorbar.update(len=length, y=1 - block * step / inner)
