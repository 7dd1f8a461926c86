"""The runs of pairs of prompts, and the estimated effects made of them within the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import torch

from nnterp.errors import Unavailable
from nnterp.huggingface import dtype_of
from nnterp.interventions._attribution._dropped import Gates, lies_inside
from nnterp.interventions._attribution._effects import first_order, is_recomputed, through_softmax
from nnterp.interventions._attribution._slopes import EMBEDDINGS, RowMetric, Slopes, slopes_of, slopes_without
from nnterp.interventions._attribution._softmax import KEYS, PATTERN, attention_of, inside_of, scales
from nnterp.interventions._engine import Key, Shortcuts, layer_of
from nnterp.interventions._grid import Grid
from nnterp.interventions._metrics import Bound, bind_some, by_prompt
from nnterp.interventions._states import States, states_of

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer

Method: TypeAlias = Literal["gradient", "integrated", "attention-aware"]


def _check_borrowed(model: StandardizedTransformer, keys: Sequence[Key]) -> None:
    """Raise if keys whose effect on their own layer's pattern is recomputed make patterns of other layers, too.

    Raises:
        Unavailable: They do; names the layers.
    """
    for lender, borrowers, _ in model.lenders:
        if (KEYS, lender) in keys:
            others = ", ".join(map(str, borrowers))
            raise Unavailable(
                f'method="attention-aware" recomputes the pattern of the layer that has the keys, and later layers '
                f"({others}) of {model.model_class} borrow the keys of layer {lender}. Leave that layer out, or take "
                'method="gradient", which follows the keys wherever they go.'
            )


class Known(NamedTuple):
    """The two unedited runs of a pair.

    Attributes:
        states: Values of the run patched from.
        source_logits, into_logits: Next-token logits of the run patched from and of that patched into, `[vocab]`.
        streams: The stream entering each layer of the run patched into, and leaving the last, `[seq, hidden]` each.
    """

    states: States
    source_logits: torch.Tensor
    into_logits: torch.Tensor
    streams: list[torch.Tensor]


class PairsRun:
    """What `attribution_patching` does with some pairs, which share a batch: their runs, and the effects made of them.

    Args:
        model: The model.
        grid: The axes of the call.
        metric: The metric.
        method: How effects are estimated.
        steps: Points between the two runs at which gradients are taken, for "integrated".
        shortcuts: Those proven for the model.
        audited: Whether exact runs follow, which then need not repeat the unedited runs of the last pairs.
        graddrop: Make effects of magnitudes, each layer's contribution being left out of the gradient in turn.

    Attributes:
        known: The unedited runs of the pairs that ran last, by index of the pair.
    """

    def __init__(
        self,
        model: StandardizedTransformer,
        grid: Grid,
        metric: Any,
        method: Method,
        steps: int,
        shortcuts: Shortcuts,
        audited: bool = False,
        graddrop: bool = False,
    ) -> None:
        self.model, self.grid, self.pairs, self.metric = model, grid, grid.pairs, metric
        self.method, self.steps, self.shortcuts = method, steps, shortcuts
        self.keys: list[Key] = [(name, layer) for name in grid.names for layer in grid.layers]
        self.recomputed = [k for k in self.keys if method == "attention-aware" and is_recomputed(k[0])]
        layers = list(dict.fromkeys(layer_of(at) for _, at in self.recomputed if at is not None))
        _check_borrowed(model, self.recomputed)
        self.inside = inside_of(layers)
        self.wrt = [k for k in self.keys if k not in self.recomputed] + [(PATTERN, layer) for layer in layers]
        self.wrt = list(dict.fromkeys(self.wrt))
        self.known: dict[int, Known] = {}
        self.streams: list[Key] = []
        if audited and shortcuts.skip and model.readout.layout.plain:
            self.streams = [("layers_input", 0), *(("layers_output", layer) for layer in range(model.num_layers))]
        self.audited = audited
        self.gates = Gates(model, grid.names, "attribution_patching(graddrop=True)") if graddrop else None

    def effects(self, chosen: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The estimated effects of some pairs, and the metric of their two unpatched runs.

        Returns:
            `[chosen, values, layers, units, columns]`, NaN where a pair has no such column; the metric of the runs
            patched into, and of those patched from, `[chosen]`; float32 on the CPU.
        """
        self.known = {}
        source = [self.pairs.source[i] for i in chosen]
        also: list[Key] = [EMBEDDINGS] if self.method == "integrated" else []
        states, logits = states_of(self.model, source, [*self.keys, *self.inside, *also], self.shortcuts)
        own = self.integrated if self.method == "integrated" else self.at_once
        made, into, bound, runs, into_logits = own(chosen, states, logits)
        for k, i in enumerate(chosen if self.audited else ()):
            streams = [runs[k][key].detach().clone() for key in self.streams]
            self.known[i] = Known(states[k], logits[k], into_logits[k].to(logits), streams)
        return made, into, by_prompt(bound, logits, list(range(len(chosen)))).cpu()

    def at_once(
        self, chosen: Sequence[int], states: list[States], logits: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, Bound, list[States], torch.Tensor]:
        """Effects by the gradient at the run patched into: one forward pass and one backward."""
        into = [self.pairs.into[i] for i in chosen]
        seen = torch.zeros_like(logits)

        def reference() -> Bound:
            return bind_some(self.metric, self.model, len(self.pairs), logits if self.pairs.denoising else seen, chosen)

        def score(own: torch.Tensor, indices: list[int]) -> torch.Tensor:
            seen[indices] = own.detach().to(seen)  # the reference, if the clean run is the one that is patched into
            return by_prompt(reference(), own, indices)

        read = list(dict.fromkeys([*self.keys, *self.inside, *self.streams]))
        if self.gates is not None:
            made, scores, values = self.magnitudes(self.gates, chosen, states, read, score)
            return made, scores, reference(), values, seen
        runs = slopes_of(self.model, into, read, score, self.shortcuts, wrt=self.wrt)
        factors = self.factors(runs, states)
        values = [run.values for run in runs]
        made = self.reduced(chosen, values, states, [run.gradients for run in runs], factors)
        return made, torch.stack([run.score for run in runs]), reference(), values, seen

    def magnitudes(
        self, gates: Gates, chosen: Sequence[int], states: list[States], read: list[Key], score: RowMetric
    ) -> tuple[torch.Tensor, torch.Tensor, list[States]]:
        """The mean size of effects over gradients that leave out one layer each: one forward pass, many backward.

        Returns:
            The effects; the metric of the runs patched into; values of these runs.
        """
        layers = [None if at is None else layer_of(at) for at in self.grid.layers]
        total = torch.zeros((len(chosen), *self.grid.shape), dtype=torch.float32)
        scores: list[torch.Tensor] = [torch.empty(())] * len(chosen)
        values: list[States] = [{}] * len(chosen)
        factors: dict[int, torch.Tensor] = {}

        def each(indices: list[int], dropped: int, runs: list[Slopes]) -> None:
            nonlocal factors
            own = [run.values for run in runs]
            source = [states[i] for i in indices]
            if dropped == gates.layers[0]:
                factors = self.factors(runs, source)
                for i, run in zip(indices, runs, strict=True):
                    scores[i], values[i] = run.score, run.values
            made = self.reduced([chosen[i] for i in indices], own, source, [run.gradients for run in runs], factors)
            total[indices] += made.abs() * counted(dropped)

        def counted(dropped: int) -> torch.Tensor:
            """1 for the values and layers of which the gradient without this layer says something."""
            rows = [[not (lies_inside(name) and at == dropped) for at in layers] for name in self.grid.names]
            return torch.tensor(rows, dtype=torch.float32)[None, ..., None, None]

        into = [self.pairs.into[i] for i in chosen]
        slopes_without(self.model, into, read, score, self.shortcuts, gates, each, wrt=self.wrt)
        times = torch.stack([counted(layer) for layer in gates.layers]).sum(0)
        return total / times, torch.stack(scores), values

    def integrated(
        self, chosen: Sequence[int], states: list[States], logits: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, Bound, list[States], torch.Tensor]:
        """Effects by gradients averaged over points between the two runs' token embeddings."""
        into = [self.pairs.into[i] for i in chosen]
        own, into_logits = states_of(
            self.model, into, list(dict.fromkeys([*self.keys, EMBEDDINGS, *self.streams])), self.shortcuts
        )
        clean = logits if self.pairs.denoising else into_logits
        bound = bind_some(self.metric, self.model, len(self.pairs), clean, chosen)
        total: torch.Tensor | None = None
        for step in range(self.steps):
            part = (step + 0.5) / self.steps
            mixed = [a[EMBEDDINGS] + part * (b[EMBEDDINGS] - a[EMBEDDINGS]) for a, b in zip(own, states, strict=True)]
            runs = slopes_of(
                self.model,
                into,
                [],
                lambda logits, indices: by_prompt(bound, logits, indices),
                self.shortcuts,
                wrt=self.wrt,
                embeddings=mixed,
            )
            made = self.reduced(chosen, own, states, [run.gradients for run in runs], {}) / self.steps
            total = made if total is None else total + made
        assert total is not None
        return total, by_prompt(bound, into_logits, list(range(len(chosen)))).cpu(), bound, own, into_logits

    def factors(self, runs: list[Slopes], states: list[States]) -> dict[int, torch.Tensor]:
        """For each layer whose softmax is recomputed, the factor from q · k to scores, checked on these runs."""
        eps = torch.finfo(dtype_of(self.model._module)).eps
        found = {}
        for layer in dict.fromkeys(layer_of(at) for _, at in self.recomputed if at is not None):
            both = [
                (attention_of(run.values, layer), attention_of(own, layer))
                for run, own in zip(runs, states, strict=True)
            ]
            found[layer] = scales(both, layer, self.model.model_class, eps)
        return found

    def reduced(
        self,
        chosen: Sequence[int],
        into: list[States],
        source: list[States],
        gradients: list[States],
        factors: dict[int, torch.Tensor],
    ) -> torch.Tensor:
        """The effects of every cell of some pairs: what leaves the batch."""
        grid = self.grid
        made = torch.full((len(chosen), *grid.shape), torch.nan, dtype=torch.float32)
        for k, i in enumerate(chosen):
            columns = grid.differing(i, self.shortcuts)
            for v, name in enumerate(grid.names):
                own = []
                for layer in grid.layers:
                    runs = ((name, layer), columns, grid.units, into[k], source[k], gradients[k])
                    recomputed = (name, layer) in self.recomputed
                    own.append(through_softmax(*runs, factors[layer_of(layer)]) if recomputed else first_order(*runs))
                made[k, v, ..., : len(columns)] = torch.stack([each.cpu() for each in own])
        return made
