"""Edges of a graph as lines: blue for positive scores, orange for negative ones, wider for stronger ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import plotly.graph_objects as go

from nnterp.display._theme import LINES

WIDTHS = (0.6, 1.2, 2.0, 3.0, 4.5, 6.5)
POSITIVE, NEGATIVE, SOFT = LINES[0], LINES[1], "#8a929c"
Segment: TypeAlias = tuple[tuple[float, float], tuple[float, float], float]  # from, to, and the score


def edge_lines(segments: Sequence[Segment], raises: str, lowers: str) -> list[go.Scatter]:
    """Lines between points, one trace for each sign and width, so that many edges are few traces.

    Args:
        segments: The edges.
        raises, lowers: The legend's text for edges with a positive and with a negative score.
    """
    most = max(abs(score) for _, _, score in segments) or 1.0
    groups: dict[tuple[bool, int], list[Segment]] = {}
    for own in segments:
        width = min(len(WIDTHS) - 1, int(len(WIDTHS) * abs(own[2]) / most))
        groups.setdefault((own[2] >= 0, width), []).append(own)
    traces, named = [], set()
    for (positive, width), some in sorted(groups.items(), key=lambda own: (not own[0][0], own[0][1])):
        x: list[float | None] = []
        y: list[float | None] = []
        for (x0, y0), (x1, y1), _ in some:
            x += [x0, x1, None]
            y += [y0, y1, None]
        name = raises if positive else lowers
        traces.append(
            go.Scatter(
                x=x,
                y=y,
                mode="lines",
                line={"color": POSITIVE if positive else NEGATIVE, "width": WIDTHS[width]},
                opacity=0.65,
                name=name,
                legendgroup=name,
                showlegend=name not in named,
                hoverinfo="skip",
            )
        )
        named.add(name)
    return traces


def edge_middles(segments: Sequence[Segment], hover: Sequence[str]) -> go.Scatter:
    """Invisible points in the middle of edges, which show the edge's text on hovering.

    Args:
        segments: The edges.
        hover: The text of each edge, escaped.
    """
    places = np.array([[a, b] for a, b, _ in segments]).mean(1)
    return go.Scatter(
        x=places[:, 0],
        y=places[:, 1],
        mode="markers",
        marker={"size": 9, "opacity": 0},
        hovertext=list(hover),
        hovertemplate="%{hovertext}<extra></extra>",
        showlegend=False,
        name="edges",
    )
