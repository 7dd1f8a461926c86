"""A text in reading order, each token coloured by a value."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go

from nnterp.display._arrays import as_array, number
from nnterp.display._cell_text import inks
from nnterp.display._grid import check_same
from nnterp.display._results import refuse_choices
from nnterp.display._text import as_names, escape
from nnterp.display._theme import DIVERGING, MONO, MONO_WIDTH, SEQUENTIAL, new_figure, shown
from nnterp.display._token_values import values_of_result
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
    prompt: int | None = None,
    title: str | None = None,
    show: bool = False,
) -> go.Figure:
    """The tokens of one text in reading order, coloured by one value each (a probability, a loss, an attribution).

    Args:
        tokens: The tokens, as ids or texts; or a result object with one value per position.
        values: `[positions]`. If some are negative and some positive, the scale is symmetric and white at zero.
        tokenizer: Names tokens that are given as ids.
        name: What the value is, with its unit.
        limits: Both ends of the colour scale; if None, the least and the greatest value (from 0, if none is negative).
        columns: Characters in a line.
        prompt: For a result of several prompts, the index of the one to draw.
        title: Plain text.
        show: Also show the figure, in a notebook or a browser.

    Returns:
        The figure.

    Raises:
        ValueError: There is not one value for each token.
        IndexError: The result has no prompt `prompt`.
        TypeError: `values` are missing and `tokens` is no result.
    """
    if values is None:
        tokens, values, name = values_of_result(tokens, name, prompt)
    else:
        refuse_choices("plot_tokens", {} if prompt is None else {"prompt": prompt})
    numbers = as_array(values, "values ([positions])", 1)
    names = as_names(tokens, tokenizer)
    check_same("tokens", len(names), len(numbers), "values")
    texts = [shorten(text, min(_LONGEST, columns - 1)) for text in names]
    starts, lines = _flow(texts, names, columns)

    figure = new_figure(title)
    _add_tokens(figure, texts, names, numbers, name, starts, lines, limits)
    longest = max(start + width(text) + 1 for start, text in zip(starts, texts, strict=True))
    return shown(_fit(figure, longest, lines[-1] + 1), show)


def _add_tokens(
    figure: go.Figure,
    texts: list[str],
    names: list[str],
    numbers: np.ndarray,
    name: str,
    starts: list[int],
    lines: list[int],
    limits: tuple[float, float] | None,
) -> None:
    """Draw each token as a bar with its text in it, and the colour bar."""
    low, high, signed = _limits(numbers, limits)
    scale = DIVERGING if signed else SEQUENTIAL
    ink = inks((numbers - low) / (high - low), scale, reverse=signed)
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
        coloraxis={"colorscale": scale, "reversescale": signed, "cmin": low, "cmax": high, "colorbar": _bar(name)}
    )


def _limits(numbers: np.ndarray, limits: tuple[float, float] | None) -> tuple[float, float, bool]:
    """Both ends of the colour scale, and whether it has both signs and is therefore symmetric around zero."""
    low, high = (float(np.nanmin(numbers)), float(np.nanmax(numbers))) if limits is None else limits
    signed = low < 0 < high
    if signed:
        low, high = -max(-low, high), max(-low, high)
    elif limits is None and low >= 0:
        low = 0.0
    return low, low + 1.0 if high == low else high, signed


def _bar(name: str) -> dict[str, Any]:
    """Settings of a horizontal colour bar below the text."""
    return {
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
    }


def _fit(figure: go.Figure, longest: int, lines: int) -> go.Figure:
    """Size the figure for lines of up to `longest` characters."""
    character = _FONT * MONO_WIDTH
    inner = max(round((longest + 0.5) * character), 300)
    end = inner / character if longest * character < inner else longest + 0.5
    hidden = {"visible": False, "fixedrange": True}
    figure.update_xaxes(**hidden, range=[0, end])
    figure.update_yaxes(**hidden, range=[lines - 0.5, -0.5])
    top = 64 if figure.layout.title.text else 20
    return figure.update_layout(
        width=inner + 48,
        height=lines * _LINE + top + 84,
        margin={"l": 24, "r": 24, "t": top, "b": 84},
        bargap=0,
    )


def _flow(texts: list[str], names: list[str], columns: int) -> tuple[list[int], list[int]]:
    """The column and the line at which each token starts; a line ends after a newline token, or when it is full."""
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
