"""An attribution graph: tokens of the prompt from left to right, layers from bottom to top."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import plotly.graph_objects as go

from nnterp.arguments import count
from nnterp.display._arrays import number
from nnterp.display._edges import NEGATIVE, SOFT, edge_lines, edge_middles
from nnterp.display._results.graph import GraphAt, NodeAt, graph_parts
from nnterp.display._text import escape
from nnterp.display._theme import LINES, new_figure, shown
from nnterp.token_text import visible, with_bytes_kept

_LOOK = {  # kind → what the legend says, symbol, colour
    "feature": ("features", "circle", LINES[2]),
    "error": ("errors", "diamond-open", SOFT),
    "embedding": ("embeddings", "square", LINES[5]),
    "logit": ("logits", "triangle-up", NEGATIVE),
}
_ABREAST, _STEP, _RISE = 5, 0.17, 0.5  # nodes of one layer and position side by side, and what is between them
_LOGITS, _LOGIT_STEP, _LOGIT_RISE = 3, 0.36, 0.8  # logits have names


def plot_attribution_graph(
    graph: Any,
    *,
    edges: int = 120,
    labels: Mapping[str, str] | None = None,
    title: str | None = None,
    show: bool = False,
) -> go.Figure:
    """An attribution graph: features, errors, embeddings and logits at their layer and token, and the strongest edges.

    Blue edges raise what they enter, orange ones lower it; the wider, the larger the effect beside all that enters the
    same node. The larger a node, the more influence it has on the logits. Nodes without an edge in the figure are left
    out, but for embeddings and logits.

    Args:
        graph: An `AttributionGraph` of `nnterp.interventions`, mostly a pruned one.
        edges: How many edges are drawn at most: those of most influence; the title says if some are left out.
        labels: Names for nodes, by the names that the graph gives them, such as `{"L2 F17 @4": "capitals"}`.
        title: Plain text.
        show: Also show the figure, in a notebook or a browser.

    Returns:
        The figure; hovering over a node says what it is, over the middle of an edge its effect.

    Raises:
        TypeError: It is no attribution graph.
        KeyError: `labels` names a node that the graph does not have.
        ValueError: The graph has no edges.

    Example:
        transcoders = {layer: nnterp.toy_dictionary(f"transcoder_{layer}") for layer in range(8)}
        graph = attribution_graph(model, transcoders, "The capital of Japan is", max_features=50)
        figure = display.plot_attribution_graph(graph.prune(0.6, 0.9))
    """
    parts = graph_parts(graph)
    names = dict(labels or {})
    known = {node.name for node in parts.nodes}
    for name in names:
        if name not in known:
            raise KeyError(f"labels names {name!r}, which is no node of the graph.")
    some = parts.edges[: count(edges, "edges")]
    text = parts.title if title is None else title
    if len(some) < len(parts.edges):
        text = f"{text or 'Attribution graph'} (the {len(some)} strongest of {len(parts.edges)} edges)"
    touched = {i for edge in some for i in (edge.source, edge.target)}
    drawn = [i for i, node in enumerate(parts.nodes) if i in touched or node.kind in ("embedding", "logit")]
    layers = sorted({node.layer for node in parts.nodes if node.layer is not None})
    at, highest = _places(parts, drawn, layers)
    figure = new_figure(text or None)
    segments = [(at[edge.source], at[edge.target], edge.share) for edge in some]
    for trace in edge_lines(segments, "raises", "lowers"):
        figure.add_trace(trace)
    hover = [
        f"{escape(parts.nodes[e.source].name)} → {escape(parts.nodes[e.target].name)}<br>effect {number(e.effect)}, "
        f"{abs(e.share):.0%} of what enters"
        for e in some
    ]
    figure.add_trace(edge_middles(segments, hover))
    for kind in _LOOK:
        own = [i for i in drawn if parts.nodes[i].kind == kind]
        if own:
            figure.add_trace(_nodes(kind, own, parts, at, names))
    rows = [(-1.0, "embeddings"), *((_height(i, highest), f"{layer}") for i, layer in enumerate(layers))]
    rows.append((_height(len(layers), highest), "logits"))
    figure.update_yaxes(
        tickvals=[y for y, _ in rows], ticktext=[label for _, label in rows], title_text="layer", zeroline=False
    )
    figure.update_xaxes(
        tickvals=list(range(len(parts.tokens))),
        ticktext=[escape(visible(with_bytes_kept(token))) for token in parts.tokens],
        zeroline=False,
        showgrid=False,
        range=[-0.6, len(parts.tokens) - 0.4],
    )
    figure.update_layout(
        width=max(640, 120 * len(parts.tokens) + 240),
        height=max(440, 130 + int(52 * (max(y for _, y in at.values()) + 2))),
        showlegend=True,
        margin={"l": 96, "r": 140, "t": 64, "b": 72},
        legend={"x": 1.02, "y": 1, "xanchor": "left", "yanchor": "top", "itemsizing": "constant"},
        hovermode="closest",
    )
    return shown(figure, show)


def _height(row: int, highest: list[int]) -> float:
    """Where a layer stands: a layer whose nodes stand in several rows takes more room."""
    return row + _RISE * sum(own - 1 for own in highest[:row])


def _places(parts: GraphAt, drawn: list[int], layers: list[int]) -> tuple[dict[int, tuple[float, float]], list[int]]:
    """Where each node stands, and how many rows of nodes each layer has."""
    cells: dict[tuple[int, int], list[int]] = {}
    for i in drawn:
        node = parts.nodes[i]
        row = -1 if node.kind == "embedding" else len(layers) if node.layer is None else layers.index(node.layer)
        cells.setdefault((row, node.position), []).append(i)
    highest = [
        max([-(-len(own) // _ABREAST) for (row, _), own in cells.items() if row == layer], default=1)
        for layer in range(len(layers))
    ]
    found = {}
    for (row, position), own in cells.items():
        base = -1.0 if row < 0 else _height(row, highest)
        ordered = sorted(own, key=lambda i: -parts.nodes[i].influence)
        abreast, step, rise = (_LOGITS, _LOGIT_STEP, _LOGIT_RISE) if row == len(layers) else (_ABREAST, _STEP, _RISE)
        for k, i in enumerate(ordered):
            line, column = divmod(k, abreast)
            here = min(abreast, len(own) - line * abreast)
            found[i] = (position + step * (column - (here - 1) / 2), base + rise * line)
    return found, highest


def _nodes(
    kind: str, own: list[int], parts: GraphAt, at: dict[int, tuple[float, float]], names: Mapping[str, str]
) -> go.Scatter:
    label, symbol, colour = _LOOK[kind]
    most = max(node.influence for node in parts.nodes) or 1.0
    nodes = [parts.nodes[i] for i in own]
    return go.Scatter(
        x=[at[i][0] for i in own],
        y=[at[i][1] for i in own],
        mode="markers+text",
        marker={
            "size": [14.0 if kind == "logit" else 8 + 12 * (node.influence / most) ** 0.5 for node in nodes],
            "symbol": symbol,
            "color": colour,
            "line": {"width": 1.5 if kind == "error" else 1},
        },
        text=[_text(node, names) for node in nodes],
        textposition="top center",
        hovertext=[_hover(node, names) for node in nodes],
        hovertemplate="%{hovertext}<extra></extra>",
        name=label,
    )


def _text(node: NodeAt, names: Mapping[str, str]) -> str:
    if node.name in names:
        return escape(names[node.name])
    return escape(visible(with_bytes_kept(node.label))) if node.kind == "logit" else ""


def _hover(node: NodeAt, names: Mapping[str, str]) -> str:
    lines = [escape(node.name), *([escape(names[node.name])] if node.name in names else [])]
    if node.activation is not None:
        lines.append(f"activation {number(node.activation)}")
    if node.probability is not None:
        lines.append(f"probability {number(node.probability)}")
    return "<br>".join([*lines, f"influence {number(node.influence)}"])
