"""Attention patterns: one head, or a wall of heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from nnterp.display._grid import Cells, fit, label_pixels, token_ticks
from nnterp.display._patterns import future, is_causal, read_pattern
from nnterp.display._text import escape
from nnterp.display._theme import SEQUENTIAL, new_figure, shown
from nnterp.display._wall import draw_wall
from nnterp.token_text import shorten


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
    page: int = 1000,
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
        page: Pixels across that a wall's tiles share; it is wider only if cells would be smaller than 2 pixels.
        show: Also show the figure, in a notebook or a browser.

    Returns:
        The figure; in a wall of several layers the last layer is on top. Keys after the query are left blank if all
        their probabilities are exactly 0 (a causal model).

    Raises:
        ValueError: `pattern` does not hold probabilities, labels do not fit their axis, or the wall has more than
            600,000 cells.
        IndexError: There is no such prompt.

    Example:
        acts = model.collect(prompts[0], "attention_probabilities")
        pattern = acts["attention_probabilities", 3][0]  # [heads, query, key]
        figure = display.plot_attention(pattern, model.tokenizer(prompts[0]).input_ids, model.tokenizer)
    """
    read = read_pattern("plot_attention", pattern, tokens, tokenizer, layers, heads, prompt, weighted)
    probs, names = read.values, read.tokens
    probs = _blank_future(probs)
    figure = (
        _one_head(probs, names, title)
        if probs.ndim == 2
        else draw_wall(probs, names, read.layers, read.heads, title, page)
    )
    if read.weighted:
        bar = {"title": {"text": "attention × value norm"}}
        figure.update_traces(zmax=float(np.nanmax(probs)) or 1.0, colorbar=bar, selector={"type": "heatmap"})
    return shown(figure, show)


def _blank_future(probs: np.ndarray) -> np.ndarray:
    """The pattern with NaN at all keys after the query, if they are all zero."""
    return np.where(future(probs), np.nan, probs) if is_causal(probs) else probs


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
