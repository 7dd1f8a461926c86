"""An attribution graph: nodes, their direct effects on each other, and what is made of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from nnterp.arguments import count, path_of
from nnterp.files import write_whole
from nnterp.interventions._graphs import _viewer
from nnterp.interventions._graphs._influence import cumulative, influence, normalized, pruned
from nnterp.interventions._graphs._node import GraphNode, Kind
from nnterp.interventions._results import drawn

if TYPE_CHECKING:
    import networkx
    import pandas

_KIND = "attribution graph"
_TENSORS = ("edges", "biases", "totals", "left_out", "left_out_size", "slopes")
Wanted: TypeAlias = "GraphNode | str | int"


@dataclass(frozen=True, eq=False, repr=False)
class AttributionGraph:
    """Features, errors, token embeddings and logits of one prompt, and the direct effects between them.

    All tensors are on the CPU, float32 (float64 of a float64 model).

    Attributes:
        nodes: Features, errors, embeddings and logits, in this order; features and errors by layer and position.
        edges: `[nodes, nodes]`, row by target: the direct effect of the column's node on the pre-activation of the
            row's feature, or on its logit. Rows of errors and embeddings are 0.
        biases: What biases add to each target, `[nodes]`.
        left_out: The effect on each target of all that is no node of this graph, `[nodes]`: features beyond
            `max_features`, and what was pruned.
        left_out_size: The sum of the absolute effects of these, `[nodes]`.
        totals: Pre-activations and logits, `[nodes]`: a row's edges, its bias and what is left out add up to it.
        slopes: Derivatives of features' activations by their pre-activations, `[nodes]`; 0 of others.
        weights: What each logit counts in influence, `[nodes]`: its probability, or equal shares of named targets.
        tokens: The prompt's tokens as texts; bytes that are part of a character as "⟨F0⟩".
        token_ids: And as ids.
        active: How many features were active; those that are no nodes are in `left_out`.
        sum_error: The largest relative error of that sum, over all targets.
        about: Model, versions, function and arguments, and what it cost.

    Example:
        transcoders = {layer: nnterp.toy_dictionary(f"transcoder_{layer}") for layer in range(8)}
        graph = attribution_graph(model, transcoders, "The capital of Japan is", max_features=50)
        small = graph.prune(0.6, 0.9)
    """

    figure: ClassVar[str] = "attribution_graph"

    nodes: tuple[GraphNode, ...]
    edges: torch.Tensor
    biases: torch.Tensor
    left_out: torch.Tensor
    left_out_size: torch.Tensor
    totals: torch.Tensor
    slopes: torch.Tensor
    weights: torch.Tensor
    tokens: tuple[str, ...]
    token_ids: tuple[int, ...]
    active: int
    sum_error: float
    about: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.nodes)

    def of_kind(self, kind: Kind) -> list[int]:
        """Find the nodes of one kind.

        Returns:
            Their indices, in the order of `nodes`.
        """
        return [i for i, node in enumerate(self.nodes) if node.kind == kind]

    def index(self, node: Wanted) -> int:
        """Find a node, given as itself, by its name, such as `"L3 F17 @4"`, or as its index.

        Returns:
            Its index in `nodes`, from 0.

        Raises:
            KeyError: The graph has no such node.
        """
        if isinstance(node, int) and not isinstance(node, bool):
            if not 0 <= node < len(self):
                raise KeyError(f"There is no node {node}: the graph has {len(self)}.")
            return node
        try:
            return self._by_name[str(node)]
        except KeyError:
            some = ", ".join(repr(str(own)) for own in (*self.nodes[:2], *self.nodes[-2:]))
            raise KeyError(f"The graph has no node {str(node)!r}; nodes are called {some}.") from None

    @cached_property
    def _by_name(self) -> dict[str, int]:
        return {str(node): i for i, node in enumerate(self.nodes)}

    @cached_property
    def influence(self) -> torch.Tensor:
        """The influence of each node on the logits, over all paths, `[nodes]`, in the dtype of `edges`, on the CPU
        (Ameisen et al. 2025, "Pruning").
        """
        return influence(normalized(self.edges), self.weights)

    @property
    def replacement(self) -> float:
        """The replacement score: of what reaches the logits from embeddings and errors, the share of embeddings.

        Paths count by their strength (Ameisen et al. 2025, "Graph scores"); 1 if there were no errors.
        """
        tokens = float(self.influence[self.of_kind("embedding")].sum())
        errors = float(self.influence[self.of_kind("error")].sum())
        return tokens / max(tokens + errors, 1e-30)

    @property
    def completeness(self) -> float:
        """The completeness score: of what enters a node, the share that comes from no error, weighted by influence."""
        targets = [*self.of_kind("feature"), *self.of_kind("logit")]
        weight = (self.influence + self.weights)[targets]
        without = 1 - normalized(self.edges)[targets][:, self.of_kind("error")].sum(1)
        return float((without * weight).sum() / weight.sum().clamp(min=1e-30))

    @property
    def left_out_share(self) -> float:
        """Of the absolute effects on a target, the share of all that is no node of the graph, weighted by influence."""
        targets = [*self.of_kind("feature"), *self.of_kind("logit")]
        weight = (self.influence + self.weights)[targets]
        away = self.left_out_size[targets]
        share = away / (away + self.edges[targets].abs().sum(1)).clamp(min=1e-30)
        return float((share * weight).sum() / weight.sum().clamp(min=1e-30))

    def into(self, node: Wanted, n: int = 10) -> list[tuple[GraphNode, float]]:
        """Find the strongest direct effects on a node.

        Returns:
            The `n` strongest, each as (the node that it comes from, the effect).
        """
        row = self.edges[self.index(node)]
        return self._strongest(row, n)

    def out_of(self, node: Wanted, n: int = 10) -> list[tuple[GraphNode, float]]:
        """Find the strongest direct effects of a node.

        Returns:
            The `n` strongest, each as (the node that it is on, the effect).
        """
        return self._strongest(self.edges[:, self.index(node)], n)

    def _strongest(self, effects: torch.Tensor, n: int) -> list[tuple[GraphNode, float]]:
        order = effects.abs().argsort(descending=True, stable=True)[: count(n, "n")].tolist()
        return [(self.nodes[i], float(effects[i])) for i in order if effects[i] != 0]

    def top(self, n: int = 10) -> list[tuple[GraphNode, float]]:
        """Find the features of most influence on the logits.

        Returns:
            The `n` features of most influence, largest first, each as (node, influence).
        """
        some = self.of_kind("feature")
        order = self.influence[some].argsort(descending=True, stable=True)[: count(n, "n")].tolist()
        return [(self.nodes[some[i]], float(self.influence[some[i]])) for i in order]

    def sums(self) -> torch.Tensor:
        """Check that each target's edges, its bias and what is left out add up to its total.

        Returns:
            The relative error of each target's sum, `[nodes]`, float32 (float64 of a float64 model) on the CPU.
        """
        made = self.edges.sum(1) + self.biases + self.left_out
        terms = torch.stack([self.edges.abs().amax(1), self.biases.abs(), self.left_out_size, self.totals.abs()])
        return (made - self.totals).abs() / terms.amax(0).clamp(min=1e-30)

    def prune(self, node_threshold: float = 0.8, edge_threshold: float = 0.98) -> AttributionGraph:
        """The graph of the nodes and edges of most influence (Ameisen et al. 2025, "Pruning", with its thresholds).

        Embeddings and logits stay. What goes is added to `left_out`, so that sums still hold.

        Args:
            node_threshold: Of the influence of all nodes, the share that the nodes that stay have together.
            edge_threshold: Of that of the edges between these, the share of the edges that stay.

        Raises:
            ValueError: One is not from 0 to 1.
        """
        for name, own in (("node_threshold", node_threshold), ("edge_threshold", edge_threshold)):
            if not 0 <= own <= 1:
                raise ValueError(f"{name} is a share from 0 to 1, not {own!r}.")
        nodes, kept = self.kept(node_threshold, edge_threshold)
        gone = torch.where(kept, torch.zeros_like(self.edges), self.edges)
        some = nodes.nonzero()[:, 0]
        edges = (self.edges * kept)[some][:, some]
        rest = {name: getattr(self, name)[some] for name in ("biases", "totals", "slopes", "weights")}
        rest["left_out"] = (self.left_out + gone.sum(1))[some]
        rest["left_out_size"] = (self.left_out_size + gone.abs().sum(1))[some]
        about = {**self.about, "pruned": {"node_threshold": node_threshold, "edge_threshold": edge_threshold}}
        return replace(self, nodes=tuple(self.nodes[i] for i in some.tolist()), edges=edges, about=about, **rest)

    def kept(self, node_threshold: float, edge_threshold: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose the nodes and edges that `prune` keeps.

        Returns:
            Two masks, bool `[nodes]` and `[nodes, nodes]` (target, source), on the CPU.
        """
        kinds = [node.kind for node in self.nodes]
        free = torch.tensor([kind in ("embedding", "logit") for kind in kinds])
        features = torch.tensor([kind == "feature" for kind in kinds])
        return pruned(self.edges, self.weights, free, features, node_threshold, edge_threshold)

    @property
    def cumulative(self) -> torch.Tensor:
        """For each node the share of influence that it and all stronger ones have together, float32 `[nodes]`, CPU."""
        return cumulative(self.influence)

    def __repr__(self) -> str:
        kinds = ", ".join(f"{len(self.of_kind(k))} {w}" for k, w in _PLURALS.items())
        cut = f" of {self.active} active" if self.active > len(self.of_kind("feature")) else ""
        return (
            f"AttributionGraph({kinds.replace(' features', f' features{cut}')}; {int((self.edges != 0).sum())} edges; "
            f"{self.about.get('model', '')}; replacement {self.replacement:.2f}, completeness {self.completeness:.2f}, "
            f"left out {self.left_out_share:.1%}; sums hold to {self.sum_error:.0e})"
        )

    def to_dataframe(self) -> pandas.DataFrame:
        """Make a table of the edges.

        Returns:
            A row for each edge, strongest first: source, target, their kinds and layers, effect, share.

        Raises:
            ModuleNotFoundError: pandas is not installed.
        """
        import pandas

        share = normalized(self.edges)
        targets, sources = self.edges.nonzero(as_tuple=True)
        order = self.edges[targets, sources].abs().argsort(descending=True, stable=True)
        rows = [
            {
                "source": str(a := self.nodes[i]),
                "source_kind": a.kind,
                "source_layer": a.layer,
                "target": str(b := self.nodes[j]),
                "target_kind": b.kind,
                "target_layer": b.layer,
                "effect": float(self.edges[j, i]),
                "share": float(share[j, i]),
            }
            for j, i in zip(targets[order].tolist(), sources[order].tolist(), strict=True)
        ]
        columns = ["source", "source_kind", "source_layer", "target", "target_kind", "target_layer", "effect", "share"]
        return pandas.DataFrame(rows, columns=columns)

    def to_networkx(self) -> networkx.DiGraph:
        """Make a graph of networkx.

        Returns:
            A directed graph: nodes by name with kind, layer, position, feature, activation and influence; edges with
            "effect".

        Raises:
            ModuleNotFoundError: networkx is not installed.
        """
        try:
            import networkx
        except ModuleNotFoundError:
            raise ModuleNotFoundError("A graph is made by networkx: pip install networkx") from None
        graph = networkx.DiGraph()
        for node, own in zip(self.nodes, self.influence.tolist(), strict=True):
            graph.add_node(str(node), **{name: getattr(node, name) for name in GraphNode.__match_args__}, influence=own)
        targets, sources = self.edges.nonzero(as_tuple=True)
        for j, i in zip(targets.tolist(), sources.tolist(), strict=True):
            graph.add_edge(str(self.nodes[i]), str(self.nodes[j]), effect=float(self.edges[j, i]))
        return graph

    def to_viewer(self, slug: str, scan: str = "", **thresholds: float) -> dict[str, Any]:
        """Prune the graph, and write it as the viewer of circuit-tracer and of Neuronpedia reads it; see `save_viewer`.

        Returns:
            What JSON can hold, as in the viewer's file.
        """
        return _viewer.content(self, slug, scan, **thresholds)

    def save_viewer(self, folder: str | Path, slug: str, scan: str = "", **thresholds: float) -> Path:
        """Write the graph for the viewer of circuit-tracer and of Neuronpedia, and list it in `graph-metadata.json`.

        Args:
            folder: Where; it is made. Graphs that are listed there stay.
            slug: The graph's name: the file is `{slug}.json`.
            scan: What the viewer calls the set of transcoders, such as a model id of Neuronpedia, from which it takes
                descriptions of features.
            **thresholds: `node_threshold` and `edge_threshold` of `prune`.

        Returns:
            The file.

        Raises:
            ValueError: The slug is no name of a file, or `graph-metadata.json` holds something else.
            OSError: It cannot be written.
        """
        return _viewer.write(self, path_of(folder), slug, scan, **thresholds)

    def save(self, path: str | Path) -> None:
        """Write the graph as safetensors; folders are made, and a write that fails leaves what was there.

        Raises:
            OSError: It cannot be written.
        """
        content = {
            "nodes": [[getattr(node, name) for name in GraphNode.__match_args__] for node in self.nodes],
            **{name: getattr(self, name) for name in ("tokens", "token_ids", "active", "sum_error", "about")},
        }
        tensors = {name: getattr(self, name).contiguous() for name in (*_TENSORS, "weights")}
        metadata = {"nnterp": _KIND, "content": json.dumps(content, ensure_ascii=False)}
        write_whole(_file(path), save_safetensors(tensors, metadata))

    @staticmethod
    def load(path: str | Path) -> AttributionGraph:
        """Read a graph that `save` wrote.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is truncated, damaged, or no graph; names the file.
        """
        path = _file(path)
        if not path.is_file():
            raise FileNotFoundError(f"There is no file {path}.")
        data = path.read_bytes()
        try:
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
            if header.get("nnterp") != _KIND:
                raise ValueError("it is another file")
            content, tensors = json.loads(header["content"]), load_safetensors(data)
            nodes = tuple(GraphNode(*row) for row in content.pop("nodes"))
            for name in ("tokens", "token_ids"):
                content[name] = tuple(content[name])
            return AttributionGraph(nodes=nodes, **tensors, **content)
        except (ValueError, KeyError, TypeError, AttributeError, Exception) as error:
            raise ValueError(f"{path} holds no attribution graph: it is damaged, or another file ({error}).") from error

    def plot(self, **kwargs: Any) -> Any:
        """Draw the graph with nnterp-display.

        Returns:
            A `plotly.graph_objects.Figure`.

        Raises:
            ModuleNotFoundError: nnterp-display is not installed.
        """
        return drawn(self, self.figure, **kwargs)


_PLURALS: dict[Kind, str] = {"feature": "features", "error": "errors", "embedding": "embeddings", "logit": "logits"}


def _file(path: str | Path) -> Path:
    path = path_of(path)
    return path if path.suffix == ".safetensors" else path.with_name(f"{path.name}.safetensors")


def indices_of(graph: AttributionGraph, wanted: Wanted | Sequence[Wanted]) -> list[int]:
    """The indices of one or several features of a graph.

    Raises:
        KeyError: The graph has no such node.
        ValueError: One is no feature, or there are none.
    """
    several = wanted if isinstance(wanted, Sequence) and not isinstance(wanted, str) else [wanted]
    found = [graph.index(node) for node in several]
    for i in found:
        if graph.nodes[i].kind != "feature":
            raise ValueError(f"{graph.nodes[i]} is no feature; features can be steered.")
    if not found:
        raise ValueError("No feature was named.")
    return found
