"""The attention pattern of one head."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go

from nnterp.display._grid import Cells, fit, label_pixels, token_ticks
from nnterp.display._text import escape
from nnterp.display._theme import SEQUENTIAL, new_figure
from nnterp.token_text import shorten


def draw_head(probs: np.ndarray, names: list[str], title: str | None) -> go.Figure:
    """The figure of one head, `[query, key]`."""
    queries, keys = probs.shape
    size = Cells.for_colour(queries, keys)
    query_names = names[keys - queries :]
    figure = new_figure(title)
    gap = 1 if size.width >= 20 else 0
    figure.add_trace(attention_map(probs, hover_texts(names, queries), xgap=gap, ygap=gap))
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


def hover_texts(names: list[str], queries: int) -> list[list[str]]:
    """What hovering says on each cell `[queries][keys]`; the queries are the last of the named tokens."""
    offset = len(names) - queries
    down = [f"query {offset + i}  {escape(shorten(name, 40))}" for i, name in enumerate(names[offset:])]
    across = [f"<br>key {j}  {escape(shorten(name, 40))}" for j, name in enumerate(names)]
    return [[query + key for key in across] for query in down]


def attention_map(probs: np.ndarray, hover: Any, **settings: Any) -> go.Heatmap:
    """The heat map of attention probabilities `[rows, columns]`, coloured from 0 to 1."""
    return go.Heatmap(
        z=probs,
        hovertext=hover,
        hovertemplate="%{hovertext}<br>%{z:.4f}<extra></extra>",
        colorscale=SEQUENTIAL,
        zmin=0,
        zmax=1,
        hoverongaps=False,
        colorbar={"title": {"text": "attention probability"}, "thickness": 14},
        **settings,
    )
