"""A graph in the format of circuit-tracer's files, which its viewer and Neuronpedia's read."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Protocol

import torch

from nnterp.files import write_whole
from nnterp.interventions._graphs._node import GraphNode
from nnterp.interventions._results import joined
from nnterp.token_text import with_bytes_kept

_SHOWN = {"\n": "⏎", "\t": "→", "\r": "↵"}
_INDEX, _PACKAGE = "graph-metadata.json", "nnterp-interventions"
_SETTINGS = {"max_features": "max_feature_nodes", "max_logits": "max_n_logits", "probability": "desired_logit_prob"}


class Shown(Protocol):
    """What is written of an `AttributionGraph`."""

    @property
    def nodes(self) -> tuple[GraphNode, ...]:
        """Its nodes."""
        ...

    @property
    def edges(self) -> torch.Tensor:
        """Direct effects, `[nodes, nodes]`."""
        ...

    @property
    def tokens(self) -> tuple[str, ...]:
        """The prompt's tokens."""
        ...

    @property
    def about(self) -> dict[str, Any]:
        """What it was made from."""
        ...

    @property
    def cumulative(self) -> torch.Tensor:
        """The share of influence of each node and all stronger ones, `[nodes]`."""
        ...

    def prune(self, node_threshold: float, edge_threshold: float) -> Shown:
        """The part of it that is shown."""
        ...


def content(
    graph: Shown, slug: str, scan: str = "", node_threshold: float = 0.8, edge_threshold: float = 0.98
) -> dict[str, Any]:
    """A graph, pruned, as the viewer reads it.

    Two things differ from circuit-tracer's own files: errors are called `error_{layer}_{position}`, because
    `0_{layer}_{position}` is also a feature of layer 0; and a feature's number is Cantor's pairing of its layer and its
    id, from which both can be told, as in files of single-layer transcoders of Neuronpedia.
    """
    part = graph.prune(node_threshold, edge_threshold)
    order = {str(node): own for node, own in zip(graph.nodes, graph.cumulative.tolist(), strict=True)}
    layers = [node.layer for node in graph.nodes if node.layer is not None]
    last = graph.about.get("num_layers", 1 + max(layers, default=-1)) + 1  # as circuit-tracer numbers logits
    names = {}
    nodes = []
    logits = 0
    touched = (part.edges != 0).any(0) | (part.edges != 0).any(1)
    for i, node in enumerate(part.nodes):
        if node.kind in ("feature", "error") and not touched[i]:
            continue
        row = _node(node, last, first=logits == 0)
        logits += node.kind == "logit"
        row["influence"] = None if node.kind == "logit" else order[str(node)]
        names[i] = row["node_id"]
        nodes.append(row)
    targets, sources = part.edges.nonzero(as_tuple=True)
    links = [
        {"source": names[i], "target": names[j], "weight": float(part.edges[j, i])}
        for j, i in zip(targets.tolist(), sources.tolist(), strict=True)
    ]
    arguments = graph.about.get("arguments", {})
    metadata = {
        "slug": slug,
        "scan": scan or str(graph.about.get("model", "")),
        "transcoder_list": [],
        "prompt_tokens": [_text(token) for token in graph.tokens],
        "prompt": joined([with_bytes_kept(token) for token in graph.tokens]),
        "node_threshold": node_threshold,
        "info": {"generator": {"name": "nnterp", "version": graph.about.get("versions", {}).get(_PACKAGE, "")}},
        "generation_settings": {
            viewers: arguments[own] for own, viewers in _SETTINGS.items() if arguments.get(own) is not None
        },
        "pruning_settings": {"node_threshold": node_threshold, "edge_threshold": edge_threshold},
    }
    parameters = {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""}
    return {"metadata": metadata, "qParams": parameters, "nodes": nodes, "links": links}


def _node(node: GraphNode, last: int, first: bool) -> dict[str, Any]:
    position = node.position
    row: dict[str, Any] = {
        "ctx_idx": position,
        "token_prob": 0.0,
        "is_target_logit": False,
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "clerp": "",
        "activation": node.activation,
    }
    if node.kind == "feature":
        assert node.layer is not None
        assert node.feature is not None
        pair = node.layer + node.feature
        row |= {
            "node_id": f"{node.layer}_{node.feature}_{position}",
            "feature": pair * (pair + 1) // 2 + node.feature,
            "layer": str(node.layer),
            "feature_type": "cross layer transcoder",
            "jsNodeId": f"{node.layer}_{node.feature}-0",
        }
    elif node.kind == "error":
        row |= {
            "node_id": f"error_{node.layer}_{position}",
            "feature": -1,
            "layer": str(node.layer),
            "feature_type": "mlp reconstruction error",
            "jsNodeId": f"error_{node.layer}_{position}-0",
        }
    elif node.kind == "embedding":
        row |= {
            "node_id": f"E_{node.feature}_{position}",
            "feature": position,
            "layer": "E",
            "feature_type": "embedding",
            "jsNodeId": f"E_{node.feature}-{position}",
        }
    else:
        chance = node.probability or 0.0
        label = _text(node.label).replace('"', "”")  # the viewer reads the token between the first two of these
        row |= {
            "node_id": f"{last}_{node.feature}_{position}" + ("" if node.probability is not None else "_difference"),
            "feature": node.feature,
            "layer": str(last),
            "feature_type": "logit",
            "token_prob": chance,
            "is_target_logit": first,
            "jsNodeId": f"L_{node.feature}-{position}",
            "clerp": f'Output "{label}" (p={chance:.3f})',
        }
    return row


def _text(token: str) -> str:
    for plain, shown in _SHOWN.items():
        token = token.replace(plain, shown)
    return token


def write(graph: Shown, folder: Path, slug: str, scan: str = "", **thresholds: float) -> Path:
    """Write `{slug}.json`, and list it in the folder's `graph-metadata.json`."""
    if not isinstance(slug, str) or re.fullmatch(r"[\w.-]*\w[\w.-]*", slug) is None or f"{slug}.json" == _INDEX:
        raise ValueError(f"slug={slug!r:.60} is no name: letters, digits, dots, dashes and underscores.")
    made = content(graph, slug, scan, **thresholds)
    index, listed = folder / _INDEX, []
    if index.is_file():
        try:
            listed = [own for own in json.loads(index.read_bytes())["graphs"] if own["slug"] != slug]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{index} lists no graphs of circuit-tracer ({error}); write to another folder."
            ) from error
    path = folder / f"{slug}.json"
    write_whole(path, json.dumps(made, ensure_ascii=False).encode())
    write_whole(index, json.dumps({"graphs": [*listed, made["metadata"]]}, ensure_ascii=False, indent=2).encode())
    return path
