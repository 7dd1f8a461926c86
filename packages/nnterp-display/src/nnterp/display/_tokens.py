"""A text as running tokens, each coloured by a value."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go

from nnterp.display import _adapt
from nnterp.display._arrays import as_array, number
from nnterp.display._cell_text import inks
from nnterp.display._grid import check_same
from nnterp.display._text import as_names, escape, escape_lines
from nnterp.display._theme import DIVERGING, MONO, MONO_WIDTH, SEQUENTIAL, new_figure, shown
from nnterp.token_text import shorten, width

_FONT = 14
_LINE = 30
_LONGEST = 40


def plot_tokens(
    tokens: Any,
    values: Any = None,
    tokenizer: Any = None,
    *,
    name: str = "value",
    limits: tuple[float, float] | None = None,
    columns: int = 90,
    title: str | None = None,
    show: bool = False,
) -> go.Figure:
    """The tokens of one text in reading order, coloured by one value each (a probability, a loss, an attribution).

    Args:
        tokens: The tokens, as ids or texts; or a result object with one value per position.
        values: `[positions]`. Values of both signs get a scale that is white at zero.
        tokenizer: Names tokens that are given as ids.
        name: What the value is, with its unit.
        limits: The ends of the colour scale; the values' own if None.
        columns: Characters in a line.
        title: Plain text.
        show: Also show the figure, in a notebook or a browser.

    Raises:
        ValueError: There is not one value for each token.
    """
    if values is None:
        tokens, values, name = _adapt.token_values(tokens, name)
    numbers = as_array(values, "values ([positions])", 1)
    names = as_names(tokens, tokenizer)
    check_same("tokens", len(names), len(numbers), "values")
    texts = [shorten(text, min(_LONGEST, columns - 1)) for text in names]
    starts, lines = _flow(texts, names, columns)

    low, high = (float(np.nanmin(numbers)), float(np.nanmax(numbers))) if limits is None else limits
    signed = low < 0 < high
    if signed:
        low, high = -max(-low, high), max(-low, high)
    elif limits is None and low >= 0:
        low = 0.0
    if high == low:
        high = low + 1.0
    ink = inks((numbers - low) / (high - low), DIVERGING if signed else SEQUENTIAL, reverse=signed)
    figure = new_figure(title)
    figure.add_trace(
        go.Bar(
            orientation="h",
            base=[start + 0.15 for start in starts],
            x=[width(text) + 0.7 for text in texts],
            y=lines,
            width=0.86,
            text=[escape(text) for text in texts],
            textposition="inside",
            insidetextanchor="middle",
            textangle=0,
            constraintext="none",
            insidetextfont={"family": MONO, "size": _FONT, "color": ink.tolist()},
            hovertext=[
                f"position {i}  {escape(full)}<br>{escape(name)} {number(value)}"
                for i, (full, value) in enumerate(zip(names, numbers, strict=True))
            ],
            hovertemplate="%{hovertext}<extra></extra>",
            marker={"color": numbers, "coloraxis": "coloraxis", "line": {"width": 0}},
        )
    )
    figure.update_layout(
        coloraxis={
            "colorscale": DIVERGING if signed else SEQUENTIAL,
            "reversescale": signed,
            "cmin": low,
            "cmax": high,
            "colorbar": {
                "orientation": "h",
                "title": {"text": escape(name), "side": "top"},
                "thickness": 12,
                "len": 260,
                "lenmode": "pixels",
                "x": 0,
                "xanchor": "left",
                "xpad": 0,
                "y": 0,
                "yref": "paper",
                "yanchor": "top",
                "ypad": 16,
            },
        }
    )
    count = lines[-1] + 1
    longest = max(start + width(text) + 1 for start, text in zip(starts, texts, strict=True))
    axis = {"visible": False, "fixedrange": True}
    figure.update_xaxes(**axis, range=[0, longest + 0.5])
    figure.update_yaxes(**axis, range=[count - 0.5, -0.5])
    inner = max(round((longest + 0.5) * _FONT * MONO_WIDTH), 300)
    if longest * _FONT * MONO_WIDTH < inner:
        figure.update_xaxes(range=[0, inner / (_FONT * MONO_WIDTH)])
    top = 64 if title else 20
    figure.update_layout(
        width=inner + 48,
        height=count * _LINE + top + 84,
        margin={"l": 24, "r": 24, "t": top, "b": 84},
        bargap=0,
        title_text=escape_lines(title) if title else None,
    )
    return shown(figure, show)


def _flow(texts: list[str], names: list[str], columns: int) -> tuple[list[int], list[int]]:
    """Where each token starts and on which line: a new line after a newline token, and where a line is full."""
    starts, lines = [], []
    at = line = 0
    for text, name in zip(texts, names, strict=True):
        needed = width(text) + 1
        if at and at + needed > columns:
            at, line = 0, line + 1
        starts.append(at)
        lines.append(line)
        at += needed
        if name.endswith("↵"):
            at, line = 0, line + 1
    return starts, lines
