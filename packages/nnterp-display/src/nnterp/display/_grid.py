"""Layout of heat maps: the size of a readable cell, the labels of the axes, the size of the whole figure."""

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
    """Pixels of one cell and its text.

    Attributes:
        width, height: Of one cell.
        font: Size of the text in it.
    """

    width: int
    height: int
    font: int

    @property
    def columns(self) -> int:
        """Columns of monospaced text that fit in a cell."""
        return max(int((self.width - _PADDING) / (self.font * MONO_WIDTH)), 1)

    @classmethod
    def for_text(cls, rows: int, columns: int, longest: int) -> Cells:
        """Cells for texts of up to `longest` columns: as wide as they need, narrower (and cut) in a wide grid."""
        font = 12 if rows <= 24 and columns <= 24 else 10
        most = 96 if columns <= 12 else 72 if columns <= 24 else 62
        wanted = round(longest * font * MONO_WIDTH) + _PADDING + 2
        return cls(min(max(wanted, 40), most), round(font * 1.9), font)

    @classmethod
    def for_colour(cls, rows: int, columns: int) -> Cells:
        """Cells without text."""
        size = max(min(640 // max(rows, columns, 1), 44), 14)
        return cls(size, size, 11)


def token_ticks(names: Sequence[str], cell: int, font: int = 11, *, vertical: bool | None = None) -> dict[str, Any]:
    """Axis settings that show every token beside its cell; turned by 90° if `vertical`, or if None where too wide."""
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
    """Axis settings for numbered rows: every label if they fit, else every 2nd, 5th, 10th, …"""
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
    """Width of the longest of these labels in pixels."""
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
    """Size a figure around a plot area of these pixels; a figure narrower than `least` gets room on the right."""
    top = 64 if figure.layout.title.text else 24
    # A colour bar as tall as a long figure is out of sight at one end, and too far from the cells at the other.
    bar = max(min(height + 20, 420), 130)
    bottom = max(bottom, bar - height)
    for trace in figure.select_traces({"type": "heatmap"}):
        lines = _wrapped(html.unescape(trace.colorbar.title.text), bar + min(top - 10, bottom))
        right += 17 * (len(lines) - 1)
        trace.colorbar.title.text = "<br>".join(escape(line) for line in lines)
        trace.colorbar.update(lenmode="pixels", len=bar, y=1, yanchor="top", ypad=10)
    total = max(left + width + right, least)
    return figure.update_layout(
        width=total,
        height=top + height + bottom,
        margin={"l": left, "r": total - left - width, "t": top, "b": bottom, "pad": 0},
    )


def _wrapped(text: str, pixels: int, font: int = 13) -> list[str]:
    """A title cut into lines of at most this many pixels."""
    return textwrap.wrap(text, max(round(pixels / (font * 0.6)), 8)) or [""]


def check_same(what: str, got: int, expected: int, of: str) -> None:
    """Check that a list of labels is as long as the axis it labels.

    Raises:
        ValueError: The lengths differ.
    """
    if got != expected:
        raise ValueError(f"{what} has {got} entries, but {of} has {expected}. Give one label for each.")


def axis_labels(what: str, labels: Sequence[object] | None, count: int, of: str) -> list[str]:
    """The labels of an axis as texts; 0, 1, … if there are none.

    Raises:
        ValueError: There is not one label for each of the `count` entries.
    """
    names = [str(i) for i in range(count)] if labels is None else [str(label) for label in labels]
    check_same(what, len(names), count, of)
    return names


def table_row(lines: int, font: int) -> int:
    """Pixels of a table row with this many lines of text, as plotly.js lays it out: 1.3 em a line and a margin."""
    return math.ceil(lines * font * 1.3) + 17
