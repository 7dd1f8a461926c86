"""A text as running tokens, each coloured by a value."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go

from nnterp.display._arrays import as_array, check_same, number
from nnterp.display._cell_text import inks
from nnterp.display._results.picking import refuse_choice
from nnterp.display._results.tokens import token_values
from nnterp.display._text import as_names, escape
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
    prompt: int | None = None,
    show: bool = False,
) -> go.Figure:
    """The tokens of one text in reading order, coloured by one value each (a probability, a loss, an attribution).

    Args:
        tokens: The tokens, as ids or texts; or a result with one value per position.
        values: `[positions]`. If there are negative and positive ones, the colour scale is white at zero.
        tokenizer: Names tokens that are given as ids.
        name: What the value is, with its unit.
        limits: The lowest and the highest value of the colour scale; those of `values` if None.
        columns: Characters in a line.
        title: Plain text.
        prompt: For a result of several prompts, which one to draw, by its index.
        show: Also show the figure, in a notebook or a browser.

    Returns:
        The figure.

    Raises:
        ValueError: There is not one value for each token.
        IndexError: There is no such prompt.

    Example:
        figure = display.plot_tokens([" a", " b"], [0.1, 0.9], name="probability")
    """
    if values is None:
        read = token_values(tokens, prompt)
        tokens, values = read.tokens, read.values
        name = read.name if name == "value" else name
    else:
        refuse_choice("plot_tokens", {}, prompt)
    numbers = as_array(values, "values ([positions])", 1)
    names = as_names(tokens, tokenizer)
    check_same("tokens", len(names), len(numbers), "values")
    texts = [shorten(text, min(_LONGEST, columns - 1)) for text in names]
    starts, lines = _flow(texts, names, columns)
    low, high, signed = _scale(numbers, limits)
    hover = [
        f"position {i}  {escape(full)}<br>{escape(name)} {number(value)}"
        for i, (full, value) in enumerate(zip(names, numbers, strict=True))
    ]
    ink = inks((numbers - low) / (high - low), DIVERGING if signed else SEQUENTIAL, reverse=signed)
    figure = new_figure(title)
    figure.add_trace(boxes(texts, starts, lines, numbers, hover, ink))
    figure.update_layout(
        coloraxis={
            "colorscale": DIVERGING if signed else SEQUENTIAL,
            "reversescale": signed,
            "cmin": low,
            "cmax": high,
            "colorbar": bar_below(name),
        }
    )
    longest = max(start + width(text) + 1 for start, text in zip(starts, texts, strict=True))
    lay_out(figure, longest, lines[-1] + 1, 64 if title else 20)
    return shown(figure, show)


def _flow(texts: list[str], names: list[str], columns: int) -> tuple[list[int], list[int]]:
    """For each token the column at which it starts, and its line.

    A line ends after a token that ends with a newline, and before a token that would not fit.
    """
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


def _scale(numbers: np.ndarray, limits: tuple[float, float] | None) -> tuple[float, float, bool]:
    """Ends of the colour scale, and whether it is the one that is white at zero."""
    low, high = (float(np.nanmin(numbers)), float(np.nanmax(numbers))) if limits is None else limits
    signed = low < 0 < high
    if signed:
        low, high = -max(-low, high), max(-low, high)
    elif limits is None and low >= 0:
        low = 0.0
    if high == low:
        high = low + 1.0
    return low, high, signed


def boxes(
    texts: list[str], starts: list[int], lines: list[int], numbers: np.ndarray, hover: list[str], ink: np.ndarray
) -> go.Bar:
    """A coloured box with its text for each token."""
    return go.Bar(
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
        hovertext=hover,
        hovertemplate="%{hovertext}<extra></extra>",
        marker={"color": numbers, "coloraxis": "coloraxis", "line": {"width": 0}},
    )


def bar_below(name: str) -> dict[str, Any]:
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


def lay_out(figure: go.Figure, longest: int, count: int, top: int) -> None:
    """Size a figure of `count` lines of up to `longest` characters, with `top` pixels above them."""
    inner = max(round((longest + 0.5) * _FONT * MONO_WIDTH), 300)
    too_narrow = longest * _FONT * MONO_WIDTH < inner
    right = inner / (_FONT * MONO_WIDTH) if too_narrow else longest + 0.5
    figure.update_xaxes(visible=False, fixedrange=True, range=[0, right])
    figure.update_yaxes(visible=False, fixedrange=True, range=[count - 0.5, -0.5])
    figure.update_layout(
        width=inner + 48,
        height=count * _LINE + top + 84,
        margin={"l": 24, "r": 24, "t": top, "b": 84},
        bargap=0,
    )
