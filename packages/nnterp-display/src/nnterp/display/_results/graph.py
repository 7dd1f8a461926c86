"""Read the nodes and edges of an attribution graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nnterp.display._arrays import as_array
from nnterp.display._results.labelled import title_of


@dataclass(frozen=True)
class NodeAt:
    """A node: its name, kind, layer and position, and what is shown of it."""

    name: str
    kind: str
    layer: int | None
    position: int
    label: str
    activation: float | None
    probability: float | None
    influence: float


@dataclass(frozen=True)
class EdgeAt:
    """An edge between two nodes, by their indices.

    Attributes:
        source, target: The nodes.
        effect: The direct effect.
        share: It as a share of all absolute effects on the target, with its sign.
    """

    source: int
    target: int
    effect: float
    share: float


@dataclass(frozen=True)
class GraphAt:
    """A graph; edges begin with those of most influence."""

    nodes: tuple[NodeAt, ...]
    edges: tuple[EdgeAt, ...]
    tokens: tuple[str, ...]
    title: str


def graph_parts(given: Any) -> GraphAt:
    """The nodes and edges of an attribution graph.

    Raises:
        TypeError: It is none.
        ValueError: It has no edges.
    """
    if not all(hasattr(given, name) for name in ("nodes", "edges", "influence", "tokens", "weights")):
        raise TypeError(f"plot_attribution_graph() draws an attribution graph, not a {type(given).__name__}.")
    effects = as_array(given.edges, "edges ([nodes, nodes])", 2)
    own = as_array(given.influence, "influence ([nodes])", 1) + as_array(given.weights, "weights ([nodes])", 1)
    size = abs(effects).sum(1, keepdims=True)
    shares = effects / size.clip(min=1e-30)
    targets, sources = effects.nonzero()
    if not len(targets):
        raise ValueError("The graph has no edges, so there is nothing to draw.")
    strength = abs(shares[targets, sources]) * own[targets]
    nodes = tuple(
        NodeAt(
            *(str(node), node.kind, node.layer, node.position, node.label, node.activation, node.probability),
            influence=float(influence),
        )
        for node, influence in zip(given.nodes, own, strict=True)
    )
    edges = tuple(
        EdgeAt(
            int(sources[k]),
            int(targets[k]),
            float(effects[targets[k], sources[k]]),
            float(shares[targets[k], sources[k]]),
        )
        for k in (-strength).argsort(kind="stable")
    )
    return GraphAt(nodes, edges, tuple(given.tokens), title_of(given, "Attribution graph"))
