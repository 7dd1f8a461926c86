"""Sizes and axis labels of heat maps and tables, so that every cell and label can be read."""

from __future__ import annotations

import html
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from nnterp.display._text import escape
from nnterp.display._theme import MONO, MONO_WIDTH
from nnterp.token_text import shorten, width

LABEL_COLUMNS = 18  # longer axis labels are cut; hovering shows all of them
_PADDING = 6


@dataclass(frozen=True)
class Cells:
    """The size of a heat map's cells, in pixels.

    Attributes:
        width, height: Size of one cell.
        font: Size of the text in it.
    """

    width: int
    height: int
    font: int

    @property
    def columns(self) -> int:
        """How many characters of monospaced text fit in a cell."""
        return max(int((self.width - _PADDING) / (self.font * MONO_WIDTH)), 1)

    @classmethod
    def for_text(cls, rows: int, columns: int, longest: int, lines: int = 1) -> Cells:
        """Cells of `lines` lines, wide enough for `longest` characters, but less wide if there are many columns."""
        font = 12 if rows <= 24 and columns <= 24 else 10
        most = 96 if columns <= 12 else 72 if columns <= 24 else 62
        wanted = round(longest * font * MONO_WIDTH) + _PADDING + 2
        return cls(min(max(wanted, 40), most), round(font * (1.9 + 1.3 * (lines - 1))), font)

    @classmethod
    def for_colour(cls, rows: int, columns: int) -> Cells:
        """Square cells without text."""
        size = max(min(640 // max(rows, columns, 1), 44), 14)
        return cls(size, size, 11)


def token_ticks(names: Sequence[str], cell: int, font: int = 11, *, vertical: bool | None = None) -> dict[str, Any]:
    """Axis settings with a label under every cell.

    Args:
        names: The labels.
        cell: Pixels of a cell.
        font: Size of the labels.
        vertical: Whether labels are turned by 90 degrees; if None, they are where they would not fit otherwise.
    """
    shown = [shorten(name, LABEL_COLUMNS) for name in names]
    turned = (
        max((width(name) for name in shown), default=0) * font * MONO_WIDTH > cell - 4 if vertical is None else vertical
    )
    return {
        "tickmode": "array",
        "tickvals": list(range(len(shown))),
        "ticktext": [escape(name) for name in shown],
        "tickfont": {"family": MONO, "size": font},
        "tickangle": -90 if turned else 0,
        "showgrid": False,
        "zeroline": False,
        "automargin": True,
    }


def number_ticks(labels: Sequence[object], cell: int, font: int = 11) -> dict[str, Any]:
    """Axis settings with every label if they fit in cells of `cell` pixels, else every 2nd, 5th, 10th, … label."""
    names = [str(label) for label in labels]
    every = next((step for step in (1, 2, 5, 10, 20, 50, 100) if step * cell >= font + 3), 100)
    kept = [i for i in range(len(names)) if i % every == 0]
    return {
        "tickmode": "array",
        "tickvals": kept,
        "ticktext": [escape(shorten(names[i], LABEL_COLUMNS)) for i in kept],
        "tickfont": {"size": font},
        "showgrid": False,
        "zeroline": False,
        "automargin": True,
    }


def label_pixels(names: Sequence[str], font: int = 11) -> int:
    """Pixels that the longest of these axis labels needs."""
    longest = max((min(width(name), LABEL_COLUMNS) for name in names), default=1)
    return round(longest * font * MONO_WIDTH) + 8


def fit(
    figure: go.Figure,
    *,
    width: int,
    height: int,
    left: int,
    bottom: int,
    right: int = 110,
    least: int = 420,
) -> go.Figure:
    """Set a figure's size, margins and colour bars around a plot area of `width` × `height` pixels.

    Args:
        figure: The figure; it is changed and returned.
        width, height: Pixels of the plot area.
        left, bottom, right: Pixels of the margins, at least.
        least: Pixels of the whole figure's width, at least; the right margin fills up what is missing.
    """
    top = 64 if figure.layout.title.text else 24
    # A colour bar as tall as a long figure could not be seen together with all cells.
    bar = max(min(height + 20, 420), 130)
    bottom = max(bottom, bar - height)
    wide = 0
    for trace in figure.select_traces({"type": "heatmap"}):
        trace.colorbar.title.text = wrap_bar_title(trace.colorbar.title.text, bar + min(top - 10, bottom))
        wide = max(wide, 17 * trace.colorbar.title.text.count("<br>"))
        trace.colorbar.update(lenmode="pixels", len=bar, y=1, yanchor="top", ypad=10)
    right += wide
    total = max(left + width + right, least)
    return figure.update_layout(
        width=total,
        height=top + height + bottom,
        margin={"l": left, "r": total - left - width, "t": top, "b": bottom, "pad": 0},
    )


def wrap_bar_title(text: str, pixels: int) -> str:
    """The title of a colour bar, escaped as it was given, in lines of at most `pixels`."""
    plain = html.unescape(text.replace("<br>", " "))
    return "<br>".join(escape(line) for line in _wrapped(plain, pixels))


def _wrapped(text: str, pixels: int, font: int = 13) -> list[str]:
    """A text in lines of at most `pixels`."""
    return textwrap.wrap(text, max(round(pixels / (font * 0.6)), 8)) or [""]


def table_row(lines: int, font: int) -> int:
    """Pixels of a table row with `lines` lines of text: plotly.js takes 1.3 em for a line, and a margin."""
    return math.ceil(lines * font * 1.3) + 17
