"""A wall of attention patterns: one tile for each head, in one heat map."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go

from nnterp.display._arrays import axis_labels
from nnterp.display._grid import fit, label_pixels
from nnterp.display._text import escape
from nnterp.display._theme import SEQUENTIAL, new_figure
from nnterp.token_text import shorten

MOST_CELLS = 600_000
_HEADING = 16  # pixels above a tile for its name
_FONT = 10


@dataclass(frozen=True)
class _Wall:
    """Where the tiles of a wall are; all sizes but `pixel` are in cells.

    Attributes:
        tiles: `[tiles, query, key]`, in reading order, float32.
        columns: Tiles side by side.
        pixel: Pixels of a cell.
        headings: What stands above each tile.
    """

    tiles: np.ndarray
    columns: int
    pixel: int
    headings: list[str]

    @property
    def queries(self) -> int:
        return self.tiles.shape[1]

    @property
    def keys(self) -> int:
        return self.tiles.shape[2]

    @property
    def rows(self) -> int:
        return math.ceil(len(self.tiles) / self.columns)

    @property
    def above(self) -> int:
        """Room above each tile, for its heading."""
        return math.ceil((_HEADING + 2) / self.pixel)

    @property
    def step(self) -> tuple[int, int]:
        """From one tile to the next, down and across."""
        return self.queries + self.above, self.keys + _gap(self.pixel)

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the whole wall."""
        return self.rows * self.step[0], self.columns * self.step[1] - _gap(self.pixel)

    def corner(self, tile: int) -> tuple[int, int]:
        """Row and column of a tile's first cell."""
        row, column = divmod(tile, self.columns)
        return row * self.step[0] + self.above, column * self.step[1]


def _gap(pixel: int) -> int:
    return max(1, math.ceil(8 / pixel))


def draw_wall(
    probs: np.ndarray,
    names: list[str],
    layers: Sequence[Any] | None,
    heads: Sequence[Any] | None,
    title: str | None,
    page: int,
) -> go.Figure:
    """A tile for each head of `[heads, query, key]`, or of `[layers, heads, query, key]` with the last layer on top.

    Every tile has its name above it. Hovering says layer, head, query and key from the names of the axes' categories,
    so that the page holds no text for each cell.

    Raises:
        ValueError: Labels do not fit their axis, or there are more than 600,000 cells.
    """
    if probs.size > MOST_CELLS:
        raise ValueError(
            f"A wall of {' × '.join(map(str, probs.shape))} has {probs.size:,} cells; a page can carry {MOST_CELLS:,}. "
            f"Choose layers, heads or positions: pattern[layer], or pattern[:, :, -20:, -20:]."
        )
    count, queries, keys = probs.shape[-3:]
    head_names = axis_labels(heads, count, "heads", "the head axis of pattern")
    one_layer = probs.ndim == 3
    columns = math.ceil(math.sqrt(count)) if one_layer else count
    pixel = min(max(min((page - 180) // columns // (keys + 1), 160 // keys), 2), 12)
    if one_layer:
        layer_names = None
        headings = [f"head {head}" for head in head_names]
    else:
        layer_names = axis_labels(layers, probs.shape[0], "layers", "the layer axis of pattern")[::-1]
        probs = probs[::-1]
        headings = _short_headings(layer_names, head_names, keys * pixel)
    wall = _Wall(probs.reshape(-1, queries, keys).astype(np.float32), columns, pixel, headings)
    figure = new_figure(title)
    figure.add_traces(_heatmaps(wall, names, layer_names, head_names))
    _frame(figure, wall)
    left = _name_axes(figure, wall, names, head_names, layer_names)
    width, height = wall.shape[1] * pixel, max(wall.shape[0] * pixel, 200)
    return fit(figure, width=width, height=height, left=left, bottom=64, right=124)


def _short_headings(layers: list[str], heads: list[str], pixels: int) -> list[str]:
    """The name of each tile, as long as fits above it: "layer 3, head 2", "L3 H2" or "3.2"."""
    for form in ("layer {}, head {}", "L{} H{}", "{}.{}"):
        named = [form.format(layer, head) for layer in layers for head in heads]
        if max(map(len, named)) * _FONT * 0.58 <= pixels + 4:
            return named
    return [name if len(name) * _FONT * 0.58 <= pixels + 8 else "" for name in named]


def _heatmaps(wall: _Wall, names: list[str], layers: list[str] | None, heads: list[str]) -> list[go.Heatmap]:
    """All tiles of layers × heads in one trace, because a cell's row and column say which they are; else one each."""
    across, down = _categories(wall, names, layers, heads)
    if layers is None:
        tiles = []
        for tile, pattern in enumerate(wall.tiles):
            y, x = wall.corner(tile)
            place = {"x": across[x : x + wall.keys], "y": down[y : y + wall.queries]}
            name = f"head {escape(heads[tile])}"
            tiles.append(_heatmap(pattern, name=name, showscale=not tile, head="%{fullData.name}<br>", **place))
        return tiles
    canvas = np.full(wall.shape, np.nan, dtype=np.float32)
    for tile, pattern in enumerate(wall.tiles):
        y, x = wall.corner(tile)
        canvas[y : y + wall.queries, x : x + wall.keys] = pattern
    return [_heatmap(canvas, x=across, y=down)]


def _heatmap(z: np.ndarray, head: str = "", **settings: Any) -> go.Heatmap:
    return go.Heatmap(
        z=z,
        hovertemplate=head + "%{y}<br>%{x}<br>%{z:.4f}<extra></extra>",
        colorscale=SEQUENTIAL,
        zmin=0,
        zmax=1,
        hoverongaps=False,
        colorbar={"title": {"text": "attention probability"}, "thickness": 14},
        **settings,
    )


def _categories(
    wall: _Wall, names: list[str], layers: list[str] | None, heads: list[str]
) -> tuple[list[str], list[str]]:
    """A name for each column and each row of cells, of which hovering shows two together.

    A category has one place. Where the name alone would not tell two places apart, empty tags that are not drawn do.
    """
    first = len(names) - wall.queries
    across = [f"gap {i}" for i in range(wall.shape[1])]
    down = [f"gap {i}" for i in range(wall.shape[0])]
    keys = [f"key {key}  {escape(shorten(name, 40))}" for key, name in enumerate(names)]
    queries = [f"query {first + i}  {escape(shorten(name, 40))}" for i, name in enumerate(names[first:])]
    for column in range(min(wall.columns, len(wall.tiles))):
        x = wall.corner(column)[1]
        name = "<i></i>" * column if layers is None else f"head {escape(heads[column])}, "
        across[x : x + wall.keys] = [name + key for key in keys]
    for row in range(wall.rows):
        y = wall.corner(row * wall.columns)[0]
        name = "<i></i>" * row if layers is None else f"layer {escape(layers[row])}, "
        down[y : y + wall.queries] = [name + query for query in queries]
    return across, down


def _frame(figure: go.Figure, wall: _Wall) -> None:
    """Draw all borders as one shape, and a heading above each tile."""
    path, notes = [], []
    for tile, heading in enumerate(wall.headings):
        y, x = wall.corner(tile)
        left, right, top, bottom = x - 0.5, x + wall.keys - 0.5, y - 0.5, y + wall.queries - 0.5
        path.append(f"M{left},{top}L{right},{top}L{right},{bottom}L{left},{bottom}Z")
        if heading:
            notes.append(
                {
                    "text": escape(heading),
                    "x": left,
                    "y": top,
                    "xanchor": "left",
                    "yanchor": "bottom",
                    "font": {"size": _FONT},
                    "borderpad": 0,
                    "xshift": -2,
                    "showarrow": False,
                }
            )
    line = {"width": 1, "color": "#8a919c"}
    figure.update_layout(shapes=[{"type": "path", "path": "".join(path), "line": line}], annotations=notes)


def _name_axes(figure: go.Figure, wall: _Wall, names: list[str], heads: list[str], layers: list[str] | None) -> int:
    """Set the labels of both axes; returns the pixels that are needed left of the wall."""
    plain = {"type": "category", "showgrid": False, "zeroline": False, "ticks": "", "tickmode": "array"}
    across, down = _categories(wall, names, layers, heads)
    figure.update_xaxes(**plain, categoryorder="array", categoryarray=across, range=[-1, wall.shape[1]])
    figure.update_yaxes(**plain, categoryorder="array", categoryarray=down, range=[wall.shape[0] - 0.5, -0.5])
    if layers is None:
        figure.update_xaxes(showticklabels=False, title_text="each tile: key position across")
        figure.update_yaxes(showticklabels=False, title_text="query position down")
        return 44
    rows = [row * wall.step[0] + wall.above + wall.queries / 2 - 0.5 for row in range(wall.rows)]
    columns = [column * wall.step[1] + wall.keys / 2 - 0.5 for column in range(wall.columns)]
    figure.update_xaxes(tickvals=columns, ticktext=list(map(escape, heads)))
    figure.update_yaxes(tickvals=rows, ticktext=list(map(escape, layers)))
    figure.update_xaxes(title_text="head (each tile: key position across)")
    figure.update_yaxes(title_text="layer (each tile: query position down)")
    return 52 + label_pixels(layers)
