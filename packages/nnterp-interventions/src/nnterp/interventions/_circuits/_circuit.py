"""Circuits: edges between nodes of a model, each with a score."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from nnterp.arguments import count, path_of
from nnterp.files import write_whole
from nnterp.interventions._attribution import AUDIT, Audit
from nnterp.interventions._circuits._connected import connected
from nnterp.interventions._circuits._graph import Graph, Input, Node
from nnterp.interventions._results import drawn

if TYPE_CHECKING:
    import networkx
    import pandas

_KIND = "circuit"


@dataclass(frozen=True)
class Edge:
    """One edge of a circuit.

    Attributes:
        sender: The node that writes.
        receiver: What reads.
        score: The estimated effect of the edge, in the metric's unit.

    Example:
        metric = logit_difference(" Paris", " Rome")
        circuit = edge_attribution(model, "The capital of France is", "The capital of Italy is", metric, audit=0)
        strongest = circuit.edges[0]
        print(strongest.sender, "→", strongest.receiver, strongest.score)
    """

    sender: Node
    receiver: Input
    score: float

    def __str__(self) -> str:
        return f"{self.sender} → {self.receiver}"


@dataclass(frozen=True, eq=False, repr=False)
class Circuit:
    """Edges of a model with their scores, strongest first.

    Attributes:
        writers: All nodes of the model that write into the stream, in forward order.
        inputs: All that reads it.
        before: For each input, how many of the first writers it reads: the edges that the model has.
        senders, receivers: For each edge of the circuit the index of its writer and of its input, int64 `[edges]`.
        scores: For each edge its score, the mean over pairs, float32 `[edges]`, on the CPU.
        completeness: The largest relative error, over inputs and pairs, of: the scores into an input sum to the
            difference of the stream that it reads times the gradient.
        by_pair: The scores of each pair, float32 `[pairs, edges]`; None if they were not asked for.
        dropped: How many edges were chosen and left out because they are on no path from the embeddings to the logits.
        about: Model, versions, function and arguments, and the audit.

    Example:
        metric = logit_difference(" Paris", " Rome")
        circuit = edge_attribution(model, "The capital of France is", "The capital of Italy is", metric, audit=0)
        print(len(circuit.top(20).scores) <= 20)  # → True
    """

    figure: ClassVar[str] = "circuit"

    writers: tuple[Node, ...]
    inputs: tuple[Input, ...]
    before: tuple[int, ...]
    senders: torch.Tensor
    receivers: torch.Tensor
    scores: torch.Tensor
    completeness: float
    by_pair: torch.Tensor | None = None
    dropped: int = 0
    about: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.scores)

    @cached_property
    def edges(self) -> tuple[Edge, ...]:
        """The edges, strongest first."""
        rows = zip(self.senders.tolist(), self.receivers.tolist(), self.scores.tolist(), strict=True)
        return tuple(Edge(self.writers[u], self.inputs[v], score) for u, v, score in rows)

    @cached_property
    def nodes(self) -> tuple[Node, ...]:
        """The nodes that an edge leaves or enters, in forward order, the logits last."""
        touched = {self.writers[u] for u in self.senders.unique().tolist()}
        touched |= {node for v in self.receivers.unique().tolist() for node in self.inputs[v].nodes}
        return tuple(node for node in (*self.writers, *self.inputs[-1].nodes) if node in touched)

    @property
    def total(self) -> int:
        """How many edges the model has."""
        return sum(self.before)

    @property
    def audit(self) -> Audit | None:
        """Scores beside the exact effects of patching those edges alone; None if it was not audited."""
        return Audit.of(self.about)

    def score(self, sender: str, receiver: str) -> float:
        """Look up one edge by its names, such as `("L3 H2", "L5 mlp")`.

        Returns:
            The score of the edge.

        Raises:
            KeyError: The circuit has no such edge.
        """
        try:
            return self._by_name[sender, receiver]
        except KeyError:
            senders = ", ".join(str(node) for node in self.writers[:4])
            raise KeyError(
                f"The circuit has no edge {sender!r} → {receiver!r}. Nodes are called {senders}, ...; inputs "
                f"{self.inputs[0]}, ..., {self.inputs[-1]}."
            ) from None

    @cached_property
    def _by_name(self) -> dict[tuple[str, str], float]:
        return {(str(edge.sender), str(edge.receiver)): edge.score for edge in self.edges}

    def top(self, n: int) -> Circuit:
        """The circuit of the `n` edges of largest absolute score, connected: see `connected`.

        It has fewer than `n` edges where some are on no path from the embeddings to the logits; `dropped` counts these.

        Raises:
            TypeError, ValueError: `n` is no integer from 0.
        """
        return self._some(torch.arange(min(count(n, "n", 0), len(self)))).connected()

    def threshold(self, least: float) -> Circuit:
        """The circuit of the edges whose absolute score is at least `least`, connected: see `connected`.

        Raises:
            ValueError: `least` is not a number.
        """
        if not isinstance(least, (int, float)) or math.isnan(least):
            raise ValueError(f"least is the smallest absolute score to keep, a number, not {least!r:.80}.")
        return self._some((self.scores.abs() >= least).nonzero()[:, 0]).connected()

    def connected(self) -> Circuit:
        """Without the edges that are on no path from the embeddings to the logits (Syed et al., 2023).

        Without them a run that keeps the circuit's edges is the same: what they would carry is never read, or is no
        other than in the run that cut edges are taken from. (Not so under post-norms, whose scale depends on all heads
        of a layer.) `dropped` says how many there were.
        """
        keep = connected(self.writers, self.inputs, self.kept)
        found = self._some(keep[self.receivers, self.senders].nonzero()[:, 0])
        return replace(found, dropped=self.dropped + len(self) - len(found))

    @cached_property
    def kept(self) -> torch.Tensor:
        """Which edges of the model are in the circuit, bool `[inputs, writers]` on the CPU."""
        kept = torch.zeros(len(self.inputs), len(self.writers), dtype=torch.bool)
        kept[self.receivers, self.senders] = True
        return kept

    def _some(self, which: torch.Tensor) -> Circuit:
        by_pair = None if self.by_pair is None else self.by_pair[:, which]
        some = {"senders": self.senders[which], "receivers": self.receivers[which], "scores": self.scores[which]}
        return replace(self, **some, by_pair=by_pair)

    def __repr__(self) -> str:
        audit = str(self.audit) if self.audit is not None else "not audited"
        dropped = f", {self.dropped} dropped as unconnected" if self.dropped else ""
        return (
            f"Circuit({len(self)} of {self.total} edges, {len(self.nodes)} nodes{dropped}; "
            f"{self.about.get('model', '')}; complete to {self.completeness:.0e}; {audit})"
        )

    def to_dataframe(self) -> pandas.DataFrame:
        """Make a table of the edges.

        Returns:
            A row for each edge, strongest first: sender, receiver, input, their layers, score.

        Raises:
            ModuleNotFoundError: pandas is not installed.
        """
        import pandas

        return pandas.DataFrame(
            [
                {
                    "sender": str(edge.sender),
                    "sender_layer": edge.sender.layer,
                    "receiver": str(edge.receiver),
                    "receiver_layer": edge.receiver.layer,
                    "input": edge.receiver.role,
                    "score": edge.score,
                }
                for edge in self.edges
            ],
            columns=["sender", "sender_layer", "receiver", "receiver_layer", "input", "score"],
        )

    def to_networkx(self) -> networkx.MultiDiGraph:
        """Make a graph of networkx.

        An edge has its "score"; its key is the input it enters: "query", "key", "value", "mixer", "mlp" or "logits".
        Keys and values that several heads share under grouped queries make an edge to each of them.

        Returns:
            A directed graph with parallel edges; nodes by name with "role", "layer" and "head".

        Raises:
            ModuleNotFoundError: networkx is not installed.
        """
        try:
            import networkx
        except ModuleNotFoundError:
            raise ModuleNotFoundError("A graph is made by networkx: pip install networkx") from None
        graph = networkx.MultiDiGraph()
        for node in self.nodes:
            graph.add_node(str(node), role=node.role, layer=node.layer, head=node.head)
        for edge in self.edges:
            for node in edge.receiver.nodes:
                graph.add_edge(str(edge.sender), str(node), key=edge.receiver.role, score=edge.score)
        return graph

    def save(self, path: str | Path) -> None:
        """Write the circuit as JSON; folders are made, and a write that fails leaves what was there.

        Raises:
            FileExistsError: The file exists and holds no circuit; it is not overwritten.
            OSError: It cannot be written.
        """
        path = json_path(path)
        if path.exists():
            try:
                _read(path)
            except ValueError as error:
                raise FileExistsError(
                    f"{path} exists and holds no circuit of nnterp. It is not overwritten: choose another name."
                ) from error
        content = {
            "nnterp": _KIND,
            "writers": [[node.role, node.layer, node.head] for node in self.writers],
            "inputs": [
                [own.role, own.layer, own.head, [[node.role, node.layer, node.head] for node in own.nodes]]
                for own in self.inputs
            ],
            "before": list(self.before),
            "senders": self.senders.tolist(),
            "receivers": self.receivers.tolist(),
            "scores": self.scores.tolist(),
            "completeness": self.completeness,
            "by_pair": None if self.by_pair is None else self.by_pair.tolist(),
            "dropped": self.dropped,
            "about": self.about,
        }
        write_whole(path, json.dumps(content, ensure_ascii=False).encode())

    @staticmethod
    def load(path: str | Path) -> Circuit:
        """Read a circuit that `save` wrote.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is truncated, damaged, or no circuit; names the file.
        """
        path = json_path(path)
        if not path.is_file():
            raise FileNotFoundError(f"There is no file {path}.")
        return _read(path)

    def plot(self, **kwargs: Any) -> Any:
        """Draw the circuit with nnterp-display.

        Returns:
            A `plotly.graph_objects.Figure`.

        Raises:
            ModuleNotFoundError: nnterp-display is not installed.
        """
        return drawn(self, self.figure, **kwargs)


def circuit_of(
    graph: Graph, scores: torch.Tensor, completeness: float, by_pair: torch.Tensor | None, about: Mapping[str, Any]
) -> Circuit:
    """The circuit of all edges of a graph.

    Args:
        graph: The graph.
        scores: `[inputs, writers]`.
        completeness: See `Circuit`.
        by_pair: `[pairs, inputs, writers]`, or None.
        about: The record of the call.
    """
    receivers, senders = graph.possible.nonzero(as_tuple=True)
    flat = scores[receivers, senders].float()
    order = flat.abs().argsort(descending=True, stable=True)
    own = None if by_pair is None else by_pair[:, receivers, senders][:, order].float()
    return Circuit(
        graph.writers,
        graph.inputs,
        graph.before,
        senders[order],
        receivers[order],
        flat[order],
        completeness,
        own,
        about=dict(about),
    )


def with_audit(circuit: Circuit, audit: Audit) -> Circuit:
    """The circuit with an audit in its record."""
    return replace(circuit, about={**circuit.about, AUDIT: audit.record()})


def json_path(path: str | Path) -> Path:
    """The file for a path with or without the suffix `.json`."""
    path = path_of(path)
    return path if path.suffix == ".json" else path.with_name(f"{path.name}.json")


def _read(path: Path) -> Circuit:
    try:
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict) or content.get("nnterp") != _KIND:
            raise ValueError("it is another file")
        by_pair = content["by_pair"]
        return Circuit(
            tuple(Node(*node) for node in content["writers"]),
            tuple(
                Input(role, layer, head, tuple(Node(*node) for node in nodes))
                for role, layer, head, nodes in content["inputs"]
            ),
            tuple(content["before"]),
            torch.tensor(content["senders"], dtype=torch.long),
            torch.tensor(content["receivers"], dtype=torch.long),
            torch.tensor(content["scores"], dtype=torch.float32),
            float(content["completeness"]),
            None if by_pair is None else torch.tensor(by_pair, dtype=torch.float32),
            content["dropped"],
            content["about"],
        )
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{path} holds no circuit of nnterp: it is damaged, or another file ({error}).") from error
