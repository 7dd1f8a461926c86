"""Text in the cells of a heat map, black or white, whichever has more contrast with its cell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.colors import get_colorscale, sample_colorscale, unlabel_rgb

from nnterp.display._text import escape_lines
from nnterp.display._theme import MONO

_STEPS = 256


def inks(levels: np.ndarray, scale: Any, *, reverse: bool = False) -> np.ndarray:
    """For each level of a colour scale, "#000000" or "#ffffff", whichever has more contrast (WCAG 2 luminance).

    Args:
        levels: Numbers from 0 to 1, of any shape; NaN counts as 0.
        scale: Name of a plotly colour scale, or its pairs of a level and a colour.
        reverse: Whether the scale is drawn reversed.

    Returns:
        An array of strings in the shape of `levels`.
    """
    pairs = get_colorscale(scale) if isinstance(scale, str) else [list(pair) for pair in scale]
    colours = [unlabel_rgb(c) for c in sample_colorscale(pairs, list(np.linspace(0, 1, _STEPS)))]
    rgb = np.array(colours) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    luminance = linear @ np.array([0.2126, 0.7152, 0.0722])
    table = np.where((luminance + 0.05) ** 2 > 0.05 * 1.05, "#000000", "#ffffff")
    places = np.clip(np.nan_to_num(np.asarray(levels, dtype=float)), 0, 1)
    index = np.rint((1 - places if reverse else places) * (_STEPS - 1)).astype(int)
    return table[index]


def cell_text(texts: Sequence[Sequence[str]], colours: np.ndarray, size: int, *, mono: bool = True) -> go.Scatter:
    """A trace with one text at the centre of each cell, `[rows][columns]`; the cells keep their own hover text.

    Args:
        texts: The texts, not yet escaped, of one or several lines; "" draws nothing.
        colours: `[rows, columns]`, of the texts.
        size: Size of the font.
        mono: Use a monospaced font.
    """
    spots = [(i, j) for i, row in enumerate(texts) for j, text in enumerate(row) if text]
    return go.Scatter(
        x=[j for _, j in spots],
        y=[i for i, _ in spots],
        text=[escape_lines(texts[i][j]) for i, j in spots],
        mode="text",
        textposition="middle center",
        textfont={"size": size, "color": [colours[i, j] for i, j in spots], **({"family": MONO} if mono else {})},
        hoverinfo="skip",
        showlegend=False,
    )
