"""A circuit as a graph, layers from bottom to top, and the curve of its faithfulness."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from nnterp.arguments import count
from nnterp.display._arrays import as_array, check_same, number
from nnterp.display._edges import SOFT, edge_lines, edge_middles
from nnterp.display._results.circuit import Curve, NodeAt, circuit_edges, faithfulness_curve
from nnterp.display._results.labelled import is_numbers
from nnterp.display._text import escape
from nnterp.display._theme import LINES, new_figure, shown


def plot_circuit(circuit: Any, *, edges: int = 100, title: str | None = None, show: bool = False) -> go.Figure:
    """A circuit as a graph: layers from bottom to top, a head of each layer at its index, the MLP above the heads.

    Blue edges raise the metric when they are patched, orange ones lower it; the wider, the larger the score.

    Args:
        circuit: A `Circuit` of `nnterp.interventions`, or (sender, receiver, score) of each edge, with names such as
            "embeddings", "L3 H2", "L3 mlp" and "logits".
        edges: How many edges are drawn at most, the strongest ones; the title says if some are left out.
        title: Plain text.
        show: Also show the figure, in a notebook or a browser.

    Returns:
        The figure; hovering over the middle of an edge says which it is, and its score.

    Raises:
        TypeError: It is neither.
        ValueError: A name is no node's, or there are no edges.

    Example:
        metric = logit_difference(" Paris", " Rome")
        circuit = edge_attribution(model, "The capital of France is", "The capital of Italy is", metric, audit=0)
        figure = display.plot_circuit(circuit.top(20))
    """
    every, own_title, score = circuit_edges(circuit)
    some = every[: count(edges, "edges")]
    text = own_title if title is None else title
    if len(some) < len(every):
        text = f"{text or 'Circuit'} (the {len(some)} strongest of {len(every)} edges)"
    nodes = {node.name: node for edge in some for node in (edge.sender, edge.receiver)}
    layers = sorted({node.layer for node in nodes.values() if node.layer is not None})
    heads = max((node.head for node in nodes.values() if node.head is not None), default=0)
    at = {name: _place(node, layers, heads) for name, node in nodes.items()}
    figure = new_figure(text or None)
    segments = [(at[edge.sender.name], at[edge.receiver.name], edge.score) for edge in some]
    for trace in edge_lines(segments, "raises the metric", "lowers the metric"):
        figure.add_trace(trace)
    hover = [
        f"{escape(edge.sender.name)} → {escape(edge.enters)}<br>{escape(score)} {number(edge.score)}" for edge in some
    ]
    figure.add_trace(edge_middles(segments, hover))
    figure.add_trace(_nodes(nodes, at))
    ticks = [(-1.0, "embeddings"), *((float(i), str(layer)) for i, layer in enumerate(layers))]
    ticks.append((float(len(layers)), "logits"))
    figure.update_yaxes(
        tickvals=[y for y, _ in ticks], ticktext=[label for _, label in ticks], title_text="layer", zeroline=False
    )
    columns = [*range(0, heads + 1, 1 + heads // 16), heads + 1]
    figure.update_xaxes(
        tickvals=columns,
        ticktext=[*map(str, columns[:-1]), "other"],
        title_text="head",
        zeroline=False,
        showgrid=False,
        range=[-0.7, heads + 1.7],
    )
    figure.update_layout(
        width=max(560, 90 * (heads + 2)),
        height=max(420, 110 + 64 * (len(layers) + 2)),
        showlegend=True,
        margin={"l": 96, "r": 140, "t": 64, "b": 64},
        legend={"x": 1.02, "y": 1, "xanchor": "left", "yanchor": "top"},
        hovermode="closest",
    )
    return shown(figure, show)


def _place(node: NodeAt, layers: list[int], heads: int) -> tuple[float, float]:
    """Where a node stands; MLPs, mixers and biases stand to the right of the heads, a little higher."""
    if node.layer is None:
        return heads / 2, -1.0 if node.name == "embeddings" else float(len(layers))
    y = float(layers.index(node.layer))
    return (float(node.head), y) if node.head is not None else (heads + 1.0, y + 0.35)


def _nodes(nodes: dict[str, NodeAt], at: dict[str, tuple[float, float]]) -> go.Scatter:
    """The nodes."""
    names = list(nodes)
    return go.Scatter(
        x=[at[name][0] for name in names],
        y=[at[name][1] for name in names],
        mode="markers+text",
        marker={"size": 12, "color": SOFT, "line": {"width": 1}},
        text=[escape(name.split(" ", 1)[-1]) for name in names],
        textposition="top center",
        hovertext=[escape(name) for name in names],
        hovertemplate="%{hovertext}<extra></extra>",
        showlegend=False,
        name="nodes",
    )


def plot_faithfulness(
    curve: Any,
    sizes: Sequence[float] | None = None,
    *,
    random: Any = None,
    title: str | None = None,
    show: bool = False,
) -> go.Figure:
    """How much of the metric's change is left when only part of the edges is kept, beside random circuits.

    Args:
        curve: `[sizes]`, 0 where the metric is that of the corrupted runs and 1 where it is that of the clean ones; or
            the result of `faithfulness` of `nnterp.interventions`.
        sizes: Fractions of the model's edges, one for each entry; a result has its own.
        random: `[controls, sizes]`, of random circuits.
        title: Plain text.
        show: Also show the figure, in a notebook or a browser.

    Returns:
        The figure, sizes on a logarithmic axis unless there is one of 0.

    Raises:
        ValueError: There is not one size for each entry.

    Example:
        figure = display.plot_faithfulness([0.2, 0.9, 1.0], sizes=[0.01, 0.1, 1])
    """
    if is_numbers(curve):
        if sizes is None:
            raise ValueError("Give sizes as well: the fraction of edges of each entry.")
        controls = None if random is None else as_array(random, "random ([controls, sizes])", 2)
        read = Curve(as_array(curve, "curve ([sizes])", 1), controls, list(sizes), "", "metric")
    else:
        read = faithfulness_curve(curve)
    check_same("sizes", len(read.sizes), len(read.values), "the curve")
    if read.random is not None:
        check_same("sizes", len(read.sizes), read.random.shape[1], "the second axis of random")
    figure = new_figure(title if title is not None else read.title or None)
    for k, control in enumerate(read.random if read.random is not None else ()):
        line = {"color": SOFT, "width": 1, "dash": "dot"}
        figure.add_trace(_curve(read.sizes, control, "random circuits", line, first=k == 0))
    figure.add_trace(_curve(read.sizes, read.values, "circuit", {"color": LINES[0], "width": 2.5}))
    for y in (0, 1):
        figure.add_hline(y=y, line={"dash": "dash", "width": 1, "color": SOFT})
    figure.update_xaxes(title_text="fraction of edges kept", type="linear" if min(read.sizes) <= 0 else "log")
    figure.update_yaxes(title_text=f"faithfulness (0 corrupted, 1 clean {escape(read.score)})", zeroline=False)
    figure.update_layout(
        width=720,
        height=440,
        showlegend=True,
        margin={"l": 72, "r": 160, "t": 64, "b": 64},
        legend={"x": 1.02, "y": 1, "xanchor": "left", "yanchor": "top"},
    )
    return shown(figure, show)


def _curve(
    sizes: Sequence[float], values: np.ndarray, name: str, line: dict[str, Any], first: bool = True
) -> go.Scatter:
    order = np.argsort(np.asarray(sizes))
    return go.Scatter(
        x=np.asarray(sizes)[order],
        y=np.asarray(values)[order],
        mode="lines+markers",
        name=name,
        legendgroup=name,
        showlegend=first,
        line=line,
        hovertemplate="%{x:.3g} of the edges: %{y:.3f}<extra></extra>",
    )
