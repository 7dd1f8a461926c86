"""A wall of attention heads: one heat map with a tile per head."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go

from nnterp.display._attention_head import attention_map, hover_texts
from nnterp.display._grid import axis_labels, fit, label_pixels
from nnterp.display._text import escape
from nnterp.display._theme import new_figure

_MOST_CELLS = 300_000


@dataclass(frozen=True)
class _Wall:
    """The geometry of a wall.

    Attributes:
        layers: Labels of the layers; None for the heads of one layer, which wrap into a roughly square wall.
        heads: Labels of the heads.
        queries, keys: Cells of a tile.
    """

    layers: list[str] | None
    heads: list[str]
    queries: int
    keys: int

    @property
    def columns(self) -> int:
        """Tiles in a row."""
        return math.ceil(math.sqrt(len(self.heads))) if self.layers is None else len(self.heads)

    @property
    def rows(self) -> int:
        """Rows of tiles."""
        return math.ceil(len(self.heads) / self.columns) if self.layers is None else len(self.layers)

    @property
    def pixel(self) -> int:
        """Pixels of a cell."""
        return min(max(min(1200 // (self.columns * self.keys), 160 // self.keys), 2), 12)

    @property
    def gap(self) -> int:
        """Empty cells between neighbours in a row."""
        return max(2, math.ceil(8 / self.pixel))

    @property
    def above(self) -> int:
        """Empty cells above a tile: room for the head's label, if layers and heads are not labelled on the axes."""
        return math.ceil(20 / self.pixel) if self.layers is None else self.gap

    @property
    def shape(self) -> tuple[int, int]:
        """Cells of the whole wall."""
        return self.rows * (self.queries + self.above), self.columns * (self.keys + self.gap) - self.gap

    def origin(self, row: int, column: int) -> tuple[int, int]:
        """The first cell (y, x) of a tile."""
        return row * (self.queries + self.above) + self.above, column * (self.keys + self.gap)

    def tiles(self) -> Iterator[tuple[str, int, int]]:
        """What each tile shows ("layer 3, head 1"), and its first cell (y, x), in the order of the heads."""
        layers = [""] if self.layers is None else [f"layer {layer}, " for layer in self.layers]
        labels = [f"{layer}head {head}" for layer in layers for head in self.heads]
        for n, label in enumerate(labels):
            yield label, *self.origin(*divmod(n, self.columns))


def draw_wall(
    probs: np.ndarray, names: list[str], layers: Sequence[Any] | None, heads: Sequence[Any] | None, title: str | None
) -> go.Figure:
    """The figure of `[heads, query, key]` or `[layers, heads, query, key]`.

    Raises:
        ValueError: Labels do not fit, or there are too many cells for a page.
    """
    if probs.size > _MOST_CELLS:
        raise ValueError(
            f"A wall of {' × '.join(map(str, probs.shape))} has {probs.size:,} cells; "
            f"a page can carry {_MOST_CELLS:,}. Choose layers, heads or positions: "
            f"pattern[layer], or pattern[:, :, -20:, -20:]."
        )
    wall = _Wall(
        heads=axis_labels("heads", heads, probs.shape[-3], "the head axis of pattern"),
        layers=None if probs.ndim == 3 else axis_labels("layers", layers, probs.shape[0], "the layer axis of pattern"),
        queries=probs.shape[-2],
        keys=probs.shape[-1],
    )
    figure = new_figure(title)
    _add_tiles(figure, wall, probs.reshape(-1, wall.queries, wall.keys), names)
    left = _label_axes(figure, wall)
    height, width = wall.shape
    return fit(
        figure,
        width=width * wall.pixel,
        height=max(height * wall.pixel, 200),
        left=left,
        bottom=64,
        right=124,
    )


def _add_tiles(figure: go.Figure, wall: _Wall, patterns: np.ndarray, names: list[str]) -> None:
    """Draw the patterns `[tiles, query, key]` as one heat map, each in a frame."""
    canvas = np.full(wall.shape, np.nan)
    hover = np.full(wall.shape, "", dtype=object)
    base = np.array(hover_texts(names, wall.queries), dtype=object)
    for (label, y, x), pattern in zip(wall.tiles(), patterns, strict=True):
        tile = slice(y, y + wall.queries), slice(x, x + wall.keys)
        canvas[tile] = pattern
        hover[tile] = f"{escape(label)}<br>" + base
        figure.add_shape(
            type="rect",
            x0=x - 0.5,
            x1=x + wall.keys - 0.5,
            y0=y - 0.5,
            y1=y + wall.queries - 0.5,
            line={"width": 1, "color": "#8a919c"},
        )
        if wall.layers is None:
            figure.add_annotation(
                text=escape(label), x=x - 0.5, y=y - 0.5, xanchor="left", yanchor="bottom", font_size=11
            )
    figure.add_trace(attention_map(canvas, hover))


def _label_axes(figure: go.Figure, wall: _Wall) -> int:
    """Label the axes; return the pixels that the labels need on the left."""
    height, width = wall.shape
    bare: dict[str, Any] = {"showgrid": False, "zeroline": False, "ticks": ""}
    figure.update_xaxes(**bare, range=[-1, width])
    figure.update_yaxes(**bare, range=[height, -0.5])
    if wall.layers is None:
        figure.update_xaxes(showticklabels=False, title_text="each tile: key position across")
        figure.update_yaxes(showticklabels=False, title_text="query position down")
        return 44
    middle_x = [wall.origin(0, column)[1] + wall.keys / 2 - 0.5 for column in range(wall.columns)]
    middle_y = [wall.origin(row, 0)[0] + wall.queries / 2 - 0.5 for row in range(wall.rows)]
    figure.update_xaxes(tickmode="array", tickvals=middle_x, ticktext=list(map(escape, wall.heads)))
    figure.update_yaxes(tickmode="array", tickvals=middle_y, ticktext=list(map(escape, wall.layers)))
    figure.update_xaxes(title_text="head (each tile: key position across)")
    figure.update_yaxes(title_text="layer (each tile: query position down)")
    return 52 + label_pixels(wall.layers)
