"""Attention patterns: one head, or a wall of heads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go

from nnterp.display._arrays import as_array, axis_labels, check_same
from nnterp.display._grid import Cells, fit, label_pixels, token_ticks
from nnterp.display._results.attention import patterns
from nnterp.display._results.labelled import is_numbers
from nnterp.display._results.picking import refuse_choice
from nnterp.display._text import as_names, escape
from nnterp.display._theme import SEQUENTIAL, new_figure, shown
from nnterp.token_text import shorten

MOST_CELLS = 300_000


def plot_attention(
    pattern: Any,
    tokens: Sequence[Any] | None = None,
    tokenizer: Any = None,
    *,
    layers: Sequence[Any] | None = None,
    heads: Sequence[Any] | None = None,
    title: str | None = None,
    prompt: int | None = None,
    weighted: bool = False,
    show: bool = False,
) -> go.Figure:
    """Attention probabilities, or these weighted by value norms: query position down, key position across.

    Args:
        pattern: `[query, key]` for one head with its tokens on both axes, `[heads, query, key]` for a wall of one
            layer's heads, `[layers, heads, query, key]` for a wall of layers × heads; or a result that holds such a
            tensor.
        tokens: The tokens of the keys, as ids or texts. If there are fewer queries, they are the last of these tokens.
        tokenizer: Names tokens that are given as ids.
        layers, heads: Labels; 0, 1, … if None.
        title: Plain text.
        prompt: For a result of several prompts, which one to draw, by its index.
        weighted: The numbers are probabilities times value norms; colours then go up to the largest. A result of
            `value_weighted_attention` says so itself.
        show: Also show the figure, in a notebook or a browser.

    Returns:
        The figure. Keys after the query are left blank if all their probabilities are exactly 0 (a causal model).

    Raises:
        ValueError: `pattern` does not hold probabilities, labels do not fit their axis, or the wall has more than
            300,000 cells.
        IndexError: There is no such prompt.
    """
    if is_numbers(pattern):
        refuse_choice("plot_attention", {}, prompt)
    else:
        read = patterns(pattern, prompt)
        pattern = read.values
        tokens = read.tokens if tokens is None else tokens
        weighted = weighted or read.weighted
        layers = read.layers if layers is None else layers
        heads = read.heads if heads is None else heads
    probs = as_array(pattern, "pattern ([query, key], [heads, query, key] or [layers, heads, query, key])", 2, 3, 4)
    _check_pattern(probs, weighted)
    keys = probs.shape[-1]
    names = [str(i) for i in range(keys)] if tokens is None else as_names(tokens, tokenizer)
    check_same("tokens", len(names), keys, "the key axis of pattern")
    probs = _blank_future(probs)
    figure = _one_head(probs, names, title) if probs.ndim == 2 else _wall(probs, names, layers, heads, title)
    if weighted:
        bar = {"title": {"text": "attention × value norm"}}
        figure.update_traces(zmax=float(np.nanmax(probs)) or 1.0, colorbar=bar, selector={"type": "heatmap"})
    return shown(figure, show)


def _check_pattern(probs: np.ndarray, weighted: bool) -> None:
    low, high = float(np.nanmin(probs)), float(np.nanmax(np.nansum(probs, -1)))
    if low < 0 or (high > 1.02 and not weighted):
        found = f"the smallest number is {low:.3g}" if low < 0 else f"one query's probabilities sum to {high:.3g}"
        raise ValueError(f"pattern must hold attention probabilities (after the softmax), but {found}.")
    queries, keys = probs.shape[-2:]
    if queries > keys:
        raise ValueError(f"pattern has {queries} queries but only {keys} keys; its last two axes are [query, key].")


def _blank_future(probs: np.ndarray) -> np.ndarray:
    """The pattern with NaN at all keys after the query, if they are all zero."""
    queries, keys = probs.shape[-2:]
    future = np.triu(np.ones((queries, keys), dtype=bool), keys - queries + 1)
    if future.any() and not np.nan_to_num(probs[..., future]).any():
        return np.where(future, np.nan, probs)
    return probs


def _heatmap(z: np.ndarray, hover: Any, **settings: Any) -> go.Heatmap:
    return go.Heatmap(
        z=z,
        hovertext=hover,
        hovertemplate="%{hovertext}<br>%{z:.4f}<extra></extra>",
        colorscale=SEQUENTIAL,
        zmin=0,
        zmax=1,
        hoverongaps=False,
        colorbar={"title": {"text": "attention probability"}, "thickness": 14},
        **settings,
    )


def _hover(names: list[str], queries: int) -> list[list[str]]:
    """Hover text `[query][key]`; the queries are the last of the tokens."""
    first = len(names) - queries
    down = [f"query {first + i}  {escape(shorten(name, 40))}" for i, name in enumerate(names[first:])]
    across = [f"<br>key {j}  {escape(shorten(name, 40))}" for j, name in enumerate(names)]
    return [[query + key for key in across] for query in down]


def _one_head(probs: np.ndarray, names: list[str], title: str | None) -> go.Figure:
    queries, keys = probs.shape
    size = Cells.for_colour(queries, keys)
    figure = new_figure(title)
    gap = 1 if size.width >= 20 else 0
    figure.add_trace(_heatmap(probs, _hover(names, queries), xgap=gap, ygap=gap))
    font = min(11, size.width - 3)
    figure.update_xaxes(
        **token_ticks(names, size.width, font, vertical=True),
        title_text="key position (token attended to)",
        range=[-0.5, keys - 0.5],
    )
    figure.update_yaxes(
        **token_ticks(names[keys - queries :], size.width, font, vertical=False),
        title_text="query position (token)",
        range=[queries - 0.5, -0.5],
    )
    labels = label_pixels(names, font)
    return fit(
        figure, width=keys * size.width, height=queries * size.height, left=labels + 44, bottom=labels + 44, right=124
    )


@dataclass(frozen=True)
class _Wall:
    """Where the tiles of a wall are, one tile for each head; all sizes are in cells.

    Attributes:
        tiles: `[tiles, query, key]`, in reading order.
        columns: Tiles side by side.
        pixel: Pixels of a cell.
        above: Room above each tile, for a heading or as a gap.
    """

    tiles: np.ndarray
    columns: int
    pixel: int
    above: int

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
    def gap(self) -> int:
        return _gap(self.pixel)

    @property
    def step(self) -> tuple[int, int]:
        """From one tile to the next, down and across."""
        return self.queries + self.above, self.keys + self.gap

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the whole wall."""
        return self.rows * self.step[0], self.columns * self.step[1] - self.gap

    def corner(self, tile: int) -> tuple[int, int]:
        """Row and column of a tile's first cell."""
        row, column = divmod(tile, self.columns)
        return row * self.step[0] + self.above, column * self.step[1]

    def middles(self) -> tuple[list[float], list[float]]:
        """The middle of each row of tiles, and of each column of tiles."""
        down = [row * self.step[0] + self.above + self.queries / 2 - 0.5 for row in range(self.rows)]
        across = [column * self.step[1] + self.keys / 2 - 0.5 for column in range(self.columns)]
        return down, across


def _gap(pixel: int) -> int:
    return max(2, math.ceil(8 / pixel))


def _wall(
    probs: np.ndarray, names: list[str], layers: Sequence[Any] | None, heads: Sequence[Any] | None, title: str | None
) -> go.Figure:
    """A tile for each head: layers down and heads across, or, of one layer, heads in reading order."""
    if probs.size > MOST_CELLS:
        raise ValueError(
            f"A wall of {' × '.join(map(str, probs.shape))} has {probs.size:,} cells; a page can carry {MOST_CELLS:,}. "
            f"Choose layers, heads or positions: pattern[layer], or pattern[:, :, -20:, -20:]."
        )
    head_names = axis_labels(heads, probs.shape[-3], "heads", "the head axis of pattern")
    if probs.ndim == 3:
        layer_names = None
        tile_names = [f"head {head}" for head in head_names]
    else:
        layer_names = axis_labels(layers, probs.shape[0], "layers", "the layer axis of pattern")
        tile_names = [f"layer {layer}, head {head}" for layer in layer_names for head in head_names]
    wall = _lay_tiles(probs)
    figure = new_figure(title)
    for tile, name in enumerate(tile_names):
        _frame(figure, wall, tile, name if layer_names is None else None)
    figure.add_trace(_heatmap(*_canvas(wall, names, tile_names)))
    figure.update_xaxes(showgrid=False, zeroline=False, ticks="", range=[-1, wall.shape[1]])
    figure.update_yaxes(showgrid=False, zeroline=False, ticks="", range=[wall.shape[0], -0.5])
    left = _name_wall_axes(figure, wall, head_names, layer_names)
    width, height = wall.shape[1] * wall.pixel, max(wall.shape[0] * wall.pixel, 200)
    return fit(figure, width=width, height=height, left=left, bottom=64, right=124)


def _lay_tiles(probs: np.ndarray) -> _Wall:
    heads, queries, keys = probs.shape[-3:]
    one_layer = probs.ndim == 3
    columns = math.ceil(math.sqrt(heads)) if one_layer else heads
    pixel = min(max(min(1200 // (columns * keys), 160 // keys), 2), 12)
    above = math.ceil(20 / pixel) if one_layer else _gap(pixel)
    return _Wall(probs.reshape(-1, queries, keys), columns, pixel, above)


def _canvas(wall: _Wall, names: list[str], tile_names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """All tiles in one array, NaN between them, and the hover text of every cell."""
    canvas = np.full(wall.shape, np.nan)
    hover = np.full(wall.shape, "", dtype=object)
    inside = np.array(_hover(names, wall.queries), dtype=object)
    for tile, name in enumerate(tile_names):
        y, x = wall.corner(tile)
        canvas[y : y + wall.queries, x : x + wall.keys] = wall.tiles[tile]
        hover[y : y + wall.queries, x : x + wall.keys] = f"{escape(name)}<br>" + inside
    return canvas, hover


def _frame(figure: go.Figure, wall: _Wall, tile: int, heading: str | None) -> None:
    """Draw the border of one tile, and a heading above it."""
    y, x = wall.corner(tile)
    figure.add_shape(
        type="rect",
        x0=x - 0.5,
        x1=x + wall.keys - 0.5,
        y0=y - 0.5,
        y1=y + wall.queries - 0.5,
        line={"width": 1, "color": "#8a919c"},
    )
    if heading is not None:
        figure.add_annotation(
            text=escape(heading), x=x - 0.5, y=y - 0.5, xanchor="left", yanchor="bottom", font_size=11
        )


def _name_wall_axes(figure: go.Figure, wall: _Wall, head_names: list[str], layer_names: list[str] | None) -> int:
    """Set the labels of both axes; returns the pixels that are needed left of the wall."""
    if layer_names is None:
        figure.update_xaxes(showticklabels=False, title_text="each tile: key position across")
        figure.update_yaxes(showticklabels=False, title_text="query position down")
        return 44
    down, across = wall.middles()
    figure.update_xaxes(tickmode="array", tickvals=across, ticktext=list(map(escape, head_names)))
    figure.update_yaxes(tickmode="array", tickvals=down, ticktext=list(map(escape, layer_names)))
    figure.update_xaxes(title_text="head (each tile: key position across)")
    figure.update_yaxes(title_text="layer (each tile: query position down)")
    return 52 + label_pixels(layer_names)
