"""The local replacement model as a graph of gradients: rows of effects on many targets by one backward pass each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from nnterp.frozen import freeze
from nnterp.interventions._attribution import Targets, Unembedding, accumulated
from nnterp.interventions._engine import Key
from nnterp.interventions._graphs._runs import Seen, bias_shares, biases_apart, held_kinds, run
from nnterp.interventions._graphs._sites import Sites
from nnterp.interventions._graphs._sources import Sources, edges_from, encoders
from nnterp.interventions._running import weights_at_rest

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer


class Replaced:
    """A run of several copies of a prompt, whose graph of gradients holds the stream, frozen attention and norms.

    What each feed-forward returned is a constant at which the graph begins, but for what a skip transcoder hands on.
    Each copy serves one target, so a backward pass is one of a batch of `rows` prompts, and its memory does not depend
    on how many features there are.

    Args:
        model: The model; its weights are here.
        sites: Where transcoders read and write.
        ids: Token ids of the prompt, `[seq]`.
        masked: Positions that have features, bool `[seq]`.
        rows: How many targets one backward pass serves.
    """

    def __init__(
        self, model: StandardizedTransformer, sites: Sites, ids: torch.Tensor, masked: torch.Tensor, rows: int
    ) -> None:
        self.model, self.sites, self.rows, self.seq = model, sites, rows, len(ids)
        self.leaves: dict[int, torch.Tensor] = {}
        skips = {own.layer: own.dictionary.skip for own in sites.replaced if own.dictionary is not None}

        def put(layer: int, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
            leaf = self.leaves[layer] = out.detach().clone().requires_grad_(True)
            skip = skips.get(layer)
            if skip is None:
                return leaf.clone()
            line = accumulated(x) @ accumulated(skip).to(x.device).T
            line = (line - line.detach()) * masked[:, None].to(line)  # zeros with a gradient
            return leaf + line.to(leaf)

        def begin(stream: torch.Tensor) -> torch.Tensor:
            self.entering = stream.detach().clone().requires_grad_(True)
            return self.entering.clone()

        with (
            weights_at_rest(model._module),
            torch.enable_grad(),
            freeze(model, held_kinds(model)),
            biases_apart(model, rows, self.seq) as self.biases,
        ):
            self.seen: Seen = run(model, sites, ids.expand(rows, -1), put, begin, logits=False)

    @torch.no_grad()
    def effects(
        self, sources: Sources, targets: Sequence[int], ends: Ends
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Direct effects on some targets, by one backward pass.

        Args:
            sources: The sources.
            targets: Indices of at most `rows` features, or after all features those of logits.
            ends: What is known of logits.

        Returns:
            `[targets, sources]`; what biases add, `[targets]`; and the pre-activations or logits that these make up.
        """
        cotangents, own, totals = self._cotangents(sources, targets, ends)
        layers = sorted(self.leaves)
        wanted = [self.entering, *(self.leaves[layer] for layer in layers), *(zeros for zeros, _ in self.biases)]
        keys = list(cotangents)
        made = torch.autograd.grad(
            [self.seen.edges[key][0] for key in keys],  # type: ignore[arg-type]
            wanted,
            [cotangents[key] for key in keys],
            retain_graph=True,
            allow_unused=True,
        )
        count = len(targets)
        entering = torch.zeros_like(self.entering) if made[0] is None else made[0]
        slopes = {
            layer: slope.reshape(self.rows, self.seq, -1)[:count]
            for layer, slope in zip(layers, made[1 : 1 + len(layers)], strict=True)
            if slope is not None
        }
        edges, decoded = edges_from(self.sites, sources, slopes, entering.reshape(self.rows, self.seq, -1)[:count])
        shares = bias_shares(self.biases, list(made[1 + len(layers) :])).expand(self.rows)[:count]
        return edges, own + decoded + shares, totals

    def _cotangents(
        self, sources: Sources, targets: Sequence[int], ends: Ends
    ) -> tuple[dict[Key, torch.Tensor], torch.Tensor, torch.Tensor]:
        """Where a backward pass begins: at each row's own target; and each target's own bias and total."""
        own = torch.zeros(len(targets), dtype=sources.entering.dtype)
        totals, found = torch.zeros_like(own), dict[Key, torch.Tensor]()
        by_key: dict[Key, list[int]] = {}
        reads = {layer.layer: layer for layer in self.sites.layers}
        for row, target in enumerate(targets):
            logit = target >= len(sources.features)
            key = self.sites.leaving if logit else reads[int(sources.features[target, 0])].reads
            by_key.setdefault(key, []).append(row)
        for key, rows in by_key.items():
            chosen = torch.tensor([targets[row] for row in rows])
            if key == self.sites.leaving:
                k = chosen - len(sources.features)
                vectors, own[rows], totals[rows] = ends.vectors[k], ends.biases[k], ends.totals[k]
                at = torch.full((len(rows),), self.seq - 1)
            else:
                layer, at, ids = sources.features[chosen].unbind(1)
                dictionary = reads[int(layer[0])].dictionary
                assert dictionary is not None
                vectors, own[rows] = encoders(dictionary, ids)
                totals[rows] = sources.pre_activations[chosen]
            _, shape, dtype = self.seen.edges[key]
            whole = torch.zeros(self.rows, self.seq, vectors.shape[1], dtype=dtype)
            whole[rows, at] = vectors.to(dtype)
            found[key] = whole.reshape(shape).to(self.seen.values[key].device)
        return found, own, totals


class Ends:
    """The logits that a graph ends in, with the final norm's scale held still.

    Args:
        model: The model.
        targets: What each logit node counts.
        leaving: The stream that leaves the last layer at the last position, `[hidden]`.
        logits: The model's own logits there, `[vocab]`.
        what: The function that needs them, for errors.

    Attributes:
        vectors: The direction of the stream that each logit is read along, `[logits, hidden]`, float32.
        biases: What biases add to each, `[logits]`.
        totals: The logits that are explained, `[logits]`.
    """

    def __init__(
        self,
        model: StandardizedTransformer,
        targets: Targets,
        leaving: torch.Tensor,
        logits: torch.Tensor,
        what: str,
    ) -> None:
        count = len(targets.ids)
        end = Unembedding(model, targets, what)
        found = end.direction(leaving.expand(count, -1), torch.arange(count), logits.expand(count, -1))
        self.vectors, self.biases, self.totals = found.vectors.cpu(), found.bias.cpu(), found.logits.cpu()
