"""Influence: how much of what reaches the logits passes through a node or an edge, directly or through other nodes.

Absolute direct effects into each node are divided by their sum, so that a path's strength is the product of its edges'
shares (Ameisen et al. 2025, Circuit Tracing, "Pruning" and "Graph scores").
"""

from __future__ import annotations

import torch


def normalized(edges: torch.Tensor) -> torch.Tensor:
    """Absolute effects as shares of all that enter their target, `[targets, sources]`."""
    size = edges.abs()
    return size / size.sum(1, keepdim=True).clamp(min=1e-30)


def influence(shares: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The influence of each node on the logits over all paths, `[nodes]`.

    Args:
        shares: `[nodes, nodes]`, row by target, of a graph without circles.
        weights: `[nodes]`: what each logit counts, and 0 of all others.
    """
    total, current = torch.zeros_like(weights), weights
    for _ in range(len(weights) + 1):
        current = current @ shares
        if not bool(current.any()):
            return total
        total = total + current
    raise ValueError("The graph has a circle: influence is defined where every edge leads to a later node.")


def least_of(scores: torch.Tensor, threshold: float) -> float:
    """The smallest of the largest scores that together are at least `threshold` of the sum of all."""
    ordered = scores.flatten().sort(descending=True).values
    shares = ordered.double().cumsum(0) / ordered.double().sum().clamp(min=1e-30)
    at = int(torch.searchsorted(shares, threshold))
    return float(ordered[min(at, len(ordered) - 1)])


def cumulative(scores: torch.Tensor) -> torch.Tensor:
    """For each node the share of influence that it and all stronger nodes have together, `[nodes]`."""
    ordered, order = scores.double().sort(descending=True, stable=True)
    found = torch.zeros_like(ordered)
    found[order] = ordered.cumsum(0) / ordered.sum().clamp(min=1e-30)
    return found.float()


def pruned(
    edges: torch.Tensor,
    weights: torch.Tensor,
    free: torch.Tensor,
    features: torch.Tensor,
    node_threshold: float,
    edge_threshold: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which nodes and edges are kept.

    The nodes of most influence stay, until they have `node_threshold` of it; then of the edges between them those of
    most influence, until they have `edge_threshold`. Then go features and errors that lead nowhere, and features that
    nothing enters.

    Args:
        edges: Direct effects, `[nodes, nodes]`.
        weights: `[nodes]`, what each logit counts.
        free: Nodes that stay in any case: embeddings and logits, bool `[nodes]`.
        features: Which nodes are features, bool `[nodes]`.
        node_threshold, edge_threshold: From 0 to 1.

    Returns:
        Bool `[nodes]` and `[nodes, nodes]`.
    """
    own = influence(normalized(edges), weights)
    nodes = (own >= least_of(own, node_threshold)) & (own > 0) | free
    rest = torch.where(nodes[:, None] & nodes, edges, torch.zeros_like(edges))
    shares = normalized(rest)
    scores = shares * (influence(shares, weights) + weights)[:, None]
    kept = (scores >= least_of(scores, edge_threshold)) & (scores > 0)
    while True:
        before = nodes.clone()
        nodes &= free | kept.any(0)
        nodes &= ~features | kept.any(1)
        kept &= nodes[:, None] & nodes
        if bool((nodes == before).all()):
            return nodes, kept
