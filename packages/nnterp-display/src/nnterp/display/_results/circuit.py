"""Read the edges of a circuit, and the curve of its faithfulness, from a result."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nnterp.display._arrays import as_array
from nnterp.display._results.labelled import require_result, score_name, title_of

_NODE = re.compile(r"embeddings|logits|L(?P<layer>\d+) (?:H(?P<head>\d+)|(?P<part>\w+))")


@dataclass(frozen=True)
class NodeAt:
    """A node of a circuit, read off its name.

    Attributes:
        name: "embeddings", "L3 H2", "L3 mlp" or "logits".
        layer: Its layer; None for embeddings and logits.
        head: Its head, if it is one.
    """

    name: str
    layer: int | None
    head: int | None


@dataclass(frozen=True)
class EdgeAt:
    """An edge between two nodes, with what the receiver's input is called and the score."""

    sender: NodeAt
    receiver: NodeAt
    enters: str
    score: float


def circuit_edges(given: Any) -> tuple[list[EdgeAt], str, str]:
    """The edges of a circuit, strongest first, the title and the name of the score.

    Keys and values that several heads share become an edge to each of them.

    Raises:
        TypeError: `given` is neither a circuit nor (sender, receiver, score) of each edge.
        ValueError: A name is no node's, or there are no edges.
    """
    if hasattr(given, "edges") and not callable(given.edges):
        found = [
            EdgeAt(node_at(str(edge.sender)), node_at(str(node)), str(edge.receiver), float(edge.score))
            for edge in given.edges
            for node in edge.receiver.nodes
        ]
        title, score = title_of(given, "Circuit"), score_name(given, "score")
    elif isinstance(given, (list, tuple)):
        found = [EdgeAt(node_at(u), node_at(v), str(v), float(score)) for u, v, score in given]
        title, score = "", "score"
    else:
        raise TypeError(f"plot_circuit() draws a circuit or (sender, receiver, score), not a {type(given).__name__}.")
    if not found:
        raise ValueError("The circuit has no edges, so there is nothing to draw.")
    return sorted(found, key=lambda edge: -abs(edge.score)), title, score


def node_at(name: Any) -> NodeAt:
    """The node of that name.

    Raises:
        ValueError: It is none.
    """
    match = _NODE.fullmatch(str(name))
    if match is None:
        raise ValueError(f"{name!r} is no node: they are called embeddings, L3 H2, L3 mlp, logits.")
    layer, head = match["layer"], match["head"]
    return NodeAt(str(name), None if layer is None else int(layer), None if head is None else int(head))


@dataclass(frozen=True)
class Curve:
    """What `plot_faithfulness` draws of a result.

    Attributes:
        values: `[sizes]`.
        random: `[controls, sizes]`; None without controls.
        sizes: Fractions of the edges.
        title: The figure's title.
        score: What was rescaled.
    """

    values: np.ndarray
    random: np.ndarray | None
    sizes: Sequence[float]
    title: str
    score: str


def faithfulness_curve(given: Any) -> Curve:
    """The curve of a result of `faithfulness`.

    Raises:
        TypeError: `given` is no result.
        ValueError: It has no faithfulness by size.
    """
    result = require_result(given, "plot_faithfulness")
    if not hasattr(result, "normalized") or "sizes" not in result.labels:
        raise ValueError("This result has no faithfulness by size.")
    random = getattr(result, "normalized_random", None)
    return Curve(
        as_array(result.normalized, "normalized ([sizes])", 1),
        None if random is None or not len(random) else as_array(random, "normalized_random ([controls, sizes])", 2),
        [float(size) for size in result.labels["sizes"]],
        title_of(result, "Faithfulness of a circuit"),
        score_name(result, "metric"),
    )
