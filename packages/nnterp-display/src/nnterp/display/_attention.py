"""Attention patterns: one head, or a wall of heads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from nnterp.display import _adapt
from nnterp.display._arrays import as_array
from nnterp.display._grid import Cells, check_same, fit, label_pixels, token_ticks
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
    show: bool = False,
) -> go.Figure:
    """Attention probabilities: query position down, key position across.

    Args:
        pattern: `[query, key]` for one head with its tokens on both axes, `[heads, query, key]` for a wall of one
            layer's heads, `[layers, heads, query, key]` for a wall of layers × heads; or a result object that holds
            such a tensor.
        tokens: The tokens of the keys, as ids or texts (the queries are the last of them, where there are fewer).
        tokenizer: Names tokens that are given as ids.
        layers, heads: Labels; 0, 1, … if None.
        title: Plain text.
        show: Also show the figure, in a notebook or a browser.

    Returns:
        The figure. The future, where a causal model gives exactly nothing, is left blank.

    Raises:
        ValueError: These are no probabilities, labels do not fit, or the wall has more than 300,000 cells.
    """
    if not _adapt.is_numbers(pattern):
        pattern, own = _adapt.attention(pattern)
        tokens = own.get("tokens") if tokens is None else tokens
        layers, heads = own.get("layers") if layers is None else layers, own.get("heads") if heads is None else heads
    probs = as_array(pattern, "pattern ([query, key], [heads, query, key] or [layers, heads, query, key])", 2, 3, 4)
    low, high = float(np.nanmin(probs)), float(np.nanmax(np.nansum(probs, -1)))
    if low < 0 or high > 1.02:
        found = f"the smallest number is {low:.3g}" if low < 0 else f"one query's probabilities sum to {high:.3g}"
        raise ValueError(f"pattern must hold attention probabilities (after the softmax), but {found}.")
    queries, keys = probs.shape[-2:]
    if queries > keys:
        raise ValueError(f"pattern has {queries} queries but only {keys} keys; its last two axes are [query, key].")
    names = [str(i) for i in range(keys)] if tokens is None else as_names(tokens, tokenizer)
    check_same("tokens", len(names), keys, "the key axis of pattern")
    probs = _blank_future(probs)
    figure = _one(probs, names, title) if probs.ndim == 2 else _wall(probs, names, layers, heads, title)
    return shown(figure, show)


def _blank_future(probs: np.ndarray) -> np.ndarray:
    """NaN above the diagonal, if nothing but zeros is there."""
    queries, keys = probs.shape[-2:]
    future = np.triu(np.ones((queries, keys), dtype=bool), keys - queries + 1)
    if future.any() and not np.nan_to_num(probs[..., future]).any():
        return np.where(future, np.nan, probs)
    return probs


def _bar() -> dict:
    return {"title": {"text": "attention probability"}, "thickness": 14}


def _one(probs: np.ndarray, names: list[str], title: str | None) -> go.Figure:
    queries, keys = probs.shape
    size = Cells.for_colour(queries, keys)
    query_names = names[keys - queries :]
    figure = new_figure(title)
    figure.add_trace(
        go.Heatmap(
            z=probs,
            hovertext=_hover(query_names, names, keys - queries),
            hovertemplate="%{hovertext}<br>%{z:.4f}<extra></extra>",
            colorscale=SEQUENTIAL,
            zmin=0,
            zmax=1,
            xgap=1 if size.width >= 20 else 0,
            ygap=1 if size.width >= 20 else 0,
            hoverongaps=False,
            colorbar=_bar(),
        )
    )
    font = min(11, size.width - 3)
    figure.update_xaxes(
        **token_ticks(names, size.width, font, vertical=True), title_text="key position (token attended to)"
    )
    figure.update_yaxes(
        **token_ticks(query_names, size.width, font, vertical=False), title_text="query position (token)"
    )
    figure.update_xaxes(range=[-0.5, keys - 0.5])
    figure.update_yaxes(range=[queries - 0.5, -0.5])
    labels = label_pixels(names, font)
    return fit(
        figure, width=keys * size.width, height=queries * size.height, left=labels + 44, bottom=labels + 44, right=124
    )


def _hover(query_names: list[str], names: list[str], offset: int) -> list[list[str]]:
    down = [f"query {offset + i}  {escape(shorten(name, 40))}" for i, name in enumerate(query_names)]
    across = [f"<br>key {j}  {escape(shorten(name, 40))}" for j, name in enumerate(names)]
    return [[query + key for key in across] for query in down]


def _wall(
    probs: np.ndarray, names: list[str], layers: Sequence[Any] | None, heads: Sequence[Any] | None, title: str | None
) -> go.Figure:
    if probs.size > MOST_CELLS:
        raise ValueError(
            f"A wall of {' × '.join(map(str, probs.shape))} has {probs.size:,} cells; a page can carry {MOST_CELLS:,}. "
            f"Choose layers, heads or positions: pattern[layer], or pattern[:, :, -20:, -20:]."
        )
    one_layer = probs.ndim == 3
    num_heads = probs.shape[0] if one_layer else probs.shape[1]
    head_names = [str(i) for i in range(num_heads)] if heads is None else [str(head) for head in heads]
    check_same("heads", len(head_names), num_heads, "the head axis of pattern")
    if one_layer:
        columns = math.ceil(math.sqrt(num_heads))
        tiles = [list(range(row, min(row + columns, num_heads))) for row in range(0, num_heads, columns)]
        flat, layer_names = probs[None], [""]
        places = [(0, head) for head in range(num_heads)]
    else:
        layer_names = [str(i) for i in range(probs.shape[0])] if layers is None else [str(layer) for layer in layers]
        check_same("layers", len(layer_names), probs.shape[0], "the layer axis of pattern")
        columns, flat = num_heads, probs
        tiles = [list(range(num_heads)) for _ in layer_names]
        places = [(layer, head) for layer in range(probs.shape[0]) for head in range(num_heads)]
    queries, keys = probs.shape[-2:]
    pixel = min(max(min(1200 // (columns * keys), 160 // keys), 2), 12)
    gap = max(2, math.ceil(8 / pixel))
    above = math.ceil(20 / pixel) if one_layer else gap
    step_x, step_y = keys + gap, queries + above
    canvas = np.full((len(tiles) * step_y, columns * step_x - gap), np.nan)
    hover = np.full(canvas.shape, "", dtype=object)
    base = np.array(_hover(names[keys - queries :], names, keys - queries), dtype=object)
    figure = new_figure(title)
    for n, (layer, head) in enumerate(places):
        row, column = divmod(n, columns)
        y, x = row * step_y + above, column * step_x
        canvas[y : y + queries, x : x + keys] = flat[layer, head]
        where = f"head {head_names[head]}" if one_layer else f"layer {layer_names[layer]}, head {head_names[head]}"
        hover[y : y + queries, x : x + keys] = f"{escape(where)}<br>" + base
        figure.add_shape(
            type="rect",
            x0=x - 0.5,
            x1=x + keys - 0.5,
            y0=y - 0.5,
            y1=y + queries - 0.5,
            line={"width": 1, "color": "#8a919c"},
        )
        if one_layer:
            figure.add_annotation(
                text=escape(f"head {head_names[head]}"),
                x=x - 0.5,
                y=y - 0.5,
                xanchor="left",
                yanchor="bottom",
                font_size=11,
            )
    figure.add_trace(
        go.Heatmap(
            z=canvas,
            hovertext=hover,
            hovertemplate="%{hovertext}<br>%{z:.4f}<extra></extra>",
            colorscale=SEQUENTIAL,
            zmin=0,
            zmax=1,
            hoverongaps=False,
            colorbar=_bar(),
        )
    )
    bare = {"showgrid": False, "zeroline": False, "ticks": ""}
    figure.update_xaxes(**bare, range=[-1, canvas.shape[1]])
    figure.update_yaxes(**bare, range=[canvas.shape[0], -0.5])
    left = 24
    if one_layer:
        figure.update_xaxes(showticklabels=False, title_text="each tile: key position across")
        figure.update_yaxes(showticklabels=False, title_text="query position down")
        left = 44
    else:
        middle_x = [column * step_x + keys / 2 - 0.5 for column in range(columns)]
        middle_y = [row * step_y + above + queries / 2 - 0.5 for row in range(len(tiles))]
        figure.update_xaxes(tickmode="array", tickvals=middle_x, ticktext=list(map(escape, head_names)))
        figure.update_yaxes(tickmode="array", tickvals=middle_y, ticktext=list(map(escape, layer_names)))
        figure.update_xaxes(title_text="head (each tile: key position across)")
        figure.update_yaxes(title_text="layer (each tile: query position down)")
        left = 52 + label_pixels(layer_names)
    return fit(
        figure,
        width=canvas.shape[1] * pixel,
        height=max(canvas.shape[0] * pixel, 200),
        left=left,
        bottom=64,
        right=124,
    )
