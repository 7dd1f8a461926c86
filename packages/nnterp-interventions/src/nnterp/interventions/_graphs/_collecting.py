"""Rows of a graph, batch by batch: which features come next, and the graph that the rows make."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from nnterp.interventions._graphs._graph import AttributionGraph
from nnterp.interventions._graphs._influence import normalized
from nnterp.interventions._graphs._node import GraphNode
from nnterp.interventions._graphs._replaced import Ends, Replaced
from nnterp.interventions._graphs._sites import Sites
from nnterp.interventions._graphs._sources import Sources
from nnterp.interventions._graphs._targets import Logits
from nnterp.interventions._results import named_texts
from nnterp.interventions._running import AUTO_ROWS, AUTO_TOKENS, BatchSize, within_memory
from nnterp.progress import bar

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer

_EVERY = 4  # batches between two looks at which features matter most


class Collecting:
    """The rows of one graph.

    Args:
        model: The model.
        sites: Where transcoders read and write.
        ids: Token ids of the prompt.
        masked: Positions that have features.
        sources: What writes into the stream.
        ends: The logits' directions.
        logits: What the logits are of.
        about: The record of the call.

    Attributes:
        rows: Index of a target → its effects `[sources]`.
    """

    def __init__(
        self,
        model: StandardizedTransformer,
        sites: Sites,
        ids: torch.Tensor,
        masked: torch.Tensor,
        sources: Sources,
        ends: Ends,
        logits: Logits,
        about: dict[str, Any],
    ) -> None:
        self.model, self.sites, self.ids, self.masked = model, sites, ids, masked
        self.sources, self.ends, self.logits, self.about = sources, ends, logits, about
        self.rows: dict[int, torch.Tensor] = {}
        self.biases: dict[int, float] = {}
        self.totals: dict[int, float] = {}
        self.errors: dict[int, float] = {}
        self.forwards, self.backwards = 0, 0
        self.replaced: Replaced | None = None

    def collect(self, max_features: int, batch_size: BatchSize, progress: bool | None) -> None:
        """Compute the rows of all logits, and of the features of most influence."""
        active, ends = len(self.sources.features), len(self.logits.labels)
        wanted = min(max_features, active)
        most = max(1, min(AUTO_ROWS, AUTO_TOKENS // len(self.ids))) if isinstance(batch_size, str) else batch_size
        rows = min(most, ends + wanted)
        # Without a cut the order is that of the logits and then of the layers, so that backward passes stay short.
        queue = list(range(active, active + ends)) + (list(range(active)) if wanted == active else [])
        with bar(ends + wanted, "attribution graph", progress, "node") as shown:
            while len(self.rows) < ends + wanted:
                if not queue:
                    left = ends + wanted - len(self.rows)
                    queue = self._next(min(left, rows * _EVERY))
                if within_memory(partial(self._step, queue[:rows], rows), rows):
                    shown.update(len(queue[:rows]))
                    queue = queue[rows:]
                else:
                    rows, self.replaced = max(1, rows // 2), None
        self.replaced = None

    def _step(self, chosen: list[int], rows: int) -> None:
        """The rows of some targets, by one backward pass."""
        if self.replaced is None:
            self.replaced = Replaced(self.model, self.sites, self.ids, self.masked, rows)
            self.forwards += rows
        self._keep(chosen, *self.replaced.effects(self.sources, chosen, self.ends))
        self.backwards += rows

    def _keep(self, chosen: list[int], edges: torch.Tensor, biases: torch.Tensor, totals: torch.Tensor) -> None:
        made = edges.double().sum(1) + biases.double()
        size = torch.stack([edges.abs().amax(1), biases.abs(), totals.abs()]).amax(0).double().clamp(min=1e-30)
        errors = ((made - totals.double()).abs() / size).tolist()
        for k, target in enumerate(chosen):
            self.rows[target] = edges[k]
            self.biases[target], self.totals[target] = float(biases[k]), float(totals[k])
            self.errors[target] = errors[k] if errors[k] == errors[k] else float("inf")

    def worst(self) -> float:
        """The largest relative error of a sum."""
        return max(self.errors.values())

    def worst_target(self) -> str:
        """The target whose sum has it."""
        target = max(self.errors, key=lambda own: self.errors[own])
        active = len(self.sources.features)
        if target >= active:
            return f"the logit of {self.logits.labels[target - active]!r}"
        layer, position, feature = self.sources.features[target].tolist()
        return f"feature {feature} of layer {layer} at position {position}"

    def _next(self, most: int) -> list[int]:
        """The features of most influence among those without a row, by the rows that there are."""
        active = len(self.sources.features)
        done = list(self.rows)
        shares = normalized(torch.stack([self.rows[i] for i in done]))
        current = torch.tensor([float(self.logits.weights[i - active]) if i >= active else 0.0 for i in done])
        features = torch.tensor([i < active for i in done])
        columns = torch.tensor(done).clamp(max=active - 1)
        total = torch.zeros(shares.shape[1])
        while bool(current.any()):
            reached = current.to(shares) @ shares
            total = total + reached
            current = torch.where(features, reached[columns], torch.zeros(()))
        known = total[:active].clone()
        known[columns[features]] = -1
        return known.argsort(descending=True, stable=True)[:most].tolist()

    def graph(self) -> AttributionGraph:
        """The graph of the rows that there are."""
        sources, seq = self.sources, len(self.ids)
        active = len(sources.features)
        chosen = sorted(own for own in self.rows if own < active)
        ends = [own for own in sorted(self.rows) if own >= active]
        away = torch.ones(sources.count, dtype=torch.bool)
        columns = torch.tensor([*chosen, *range(active, sources.count)])
        away[columns] = False
        nodes = self._nodes(chosen, [own - active for own in ends])
        whole = torch.zeros(len(nodes), len(nodes), dtype=sources.entering.dtype)
        vectors = {name: torch.zeros(len(nodes), dtype=whole.dtype) for name in ("biases", "left_out", "totals")}
        vectors |= {name: torch.zeros(len(nodes), dtype=whole.dtype) for name in ("left_out_size", "slopes", "weights")}
        targets = [*range(len(chosen)), *range(len(nodes) - len(ends), len(nodes))]
        for place, own in zip(targets, [*chosen, *ends], strict=True):
            row = self.rows[own]
            whole[place, : len(columns)] = row[columns]
            vectors["left_out"][place], vectors["left_out_size"][place] = row[away].sum(), row[away].abs().sum()
            vectors["biases"][place], vectors["totals"][place] = self.biases[own], self.totals[own]
            if own < active:
                vectors["slopes"][place] = sources.slopes[own]
            else:
                vectors["weights"][place] = self.logits.weights[own - active]
        cost = {
            "forwards": 1 + self.forwards,
            "backwards": self.backwards,
            "unit": "passes of the prompt alone",
            "nodes": len(self.rows),
        }
        return AttributionGraph(
            nodes=nodes,
            edges=whole,
            **vectors,
            tokens=tuple(named_texts(self.model, self.ids)),
            token_ids=tuple(self.ids.tolist()),
            active=active,
            sum_error=max([own for target, own in self.errors.items() if target in self.rows], default=0.0),
            about={**self.about, "cost": cost, "seq": seq},
        )

    def _nodes(self, chosen: list[int], ends: list[int]) -> tuple[GraphNode, ...]:
        sources, ids = self.sources, self.ids.tolist()
        texts = named_texts(self.model, ids)
        found = []
        for own in chosen:
            layer, position, feature = sources.features[own].tolist()
            found.append(GraphNode("feature", layer, position, feature, float(sources.activations[own])))
        for written in sources.layers:
            found += [GraphNode("error", written.own.layer, position) for position in range(len(ids))]
        found += [
            GraphNode("embedding", None, position, ids[position], label=texts[position]) for position in range(len(ids))
        ]
        for k in ends:
            token, label = int(self.logits.targets.correct[k, 0]), self.logits.labels[k]
            found.append(
                GraphNode("logit", None, len(ids) - 1, token, probability=self.logits.probabilities[k], label=label)
            )
        return tuple(found)
