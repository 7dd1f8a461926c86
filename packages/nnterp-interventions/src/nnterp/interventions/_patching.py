"""Activation patching: which activations of one prompt, written into another's run, change the prediction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from nnterp.arguments import listed
from nnterp.defaults import plain_defaults
from nnterp.indices import Indices
from nnterp.inputs import Row
from nnterp.interventions._engine import Cell, Kept, sweep
from nnterp.interventions._grid import Grid
from nnterp.interventions._metrics import Bound, bind_some, by_prompt, metric_name, scored
from nnterp.interventions._pairs import Direction, encode_pairs, gap_between
from nnterp.interventions._partial import DONE, Resume, held_of, ids_of, resumed, unfinished
from nnterp.interventions._proving import proven_shortcuts
from nnterp.interventions._results import Result, describe_run, prompt_labels
from nnterp.interventions._running import BatchSize, bar, check_batch_size
from nnterp.interventions._states import states_of
from nnterp.positions import Positions
from nnterp.resuming import Call

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer

PAIRS = 8  # pairs of prompts whose activations are held at a time


@dataclass(frozen=True, eq=False, repr=False)
class PatchingResult(Result):
    """The metric of each patched run, `scores`, and of the unpatched `clean` and `corrupted` runs, `[prompts]`.

    Example:
        metric = logit_difference(" Paris", " Rome")
        result = activation_patching(model, "The capital of France is", "The capital of Italy is", metric)
        shares = result.normalized()["scores"]  # [prompts, layers, positions]: 0 the corrupted run, 1 the clean one
    """

    figure: ClassVar[str] = "patching"

    def normalized(self) -> PatchingResult:
        """Scores rescaled so that the run patched into has 0 and the run patched from has 1.

        NaN where the two runs have the same metric, up to rounding (1e-6 of the larger one).
        """
        clean, corrupted = self["clean"], self["corrupted"]
        into, source = (corrupted, clean) if self.about["arguments"]["direction"] == "denoising" else (clean, corrupted)
        shape = (-1,) + (1,) * (self["scores"].dim() - 1)
        scores = (self["scores"] - into.view(shape)) / gap_between(source, into).view(shape)
        return replace(self, tensors={**self.tensors, "scores": scores})


@plain_defaults()
def activation_patching(
    model: StandardizedTransformer,
    clean: Any,
    corrupted: Any,
    metric: Any,
    values: str | Sequence[str] = "layers_output",
    layers: Indices = None,
    positions: Positions | Literal["all"] = None,
    heads: Indices = None,
    direction: Direction = "denoising",
    *,
    batch_size: BatchSize = "auto",
    progress: bool | None = None,
    remote: Any = False,
    resume: Resume = None,
) -> PatchingResult:
    """Run one prompt once for each layer, position or head, with that activation replaced by another prompt's.

    Every score equals that of a forward pass of its own; what such passes have in common is computed once. (Vig et al.,
    2020; Meng et al., 2022, "causal tracing"; Heimersheim and Nanda, "How to use and interpret activation patching",
    2024.)

    Args:
        model: The model.
        clean: A prompt, or a list.
        corrupted: As many prompts, one for each clean one.
        metric: `logit_difference(...)`, `target_probability(...)`, `kl_divergence()`, or a function of the next-token
            logits `[n, vocab]` of n runs that returns n numbers.
        values: What is patched: the name of a value, or several ("layers_output" for the residual stream,
            "attention_contributions", "mlp_contributions", "attention_head_outputs", "attention_probabilities", ...).
        layers: The layer or layers; all that have the value if None.
        positions: Positions over the prompts' own tokens, or text selectors, each patched in a run of its own; a
            selector that matches several tokens patches them at once. None for every position, each on its own; "all"
            for all at once, which is also what None means if `heads` are given.
        heads: Patch each of these heads (or neurons) on its own: indices or "all".
        direction: "denoising" puts activations of the clean run into the corrupted one, "noising" the reverse.
        batch_size: Rows of a batch; "auto" halves when memory runs out and goes on.
        progress: Show a progress bar; with None, only if the work lasts.
        remote: Run on the remote service, the metric included; the activations to patch in are fetched first.
        resume: The partial result of the same call that was cut short (an error's `partial`), or the file it was saved
            to: what is `done` in it is not run again.

    Returns:
        `scores` with the axes prompts, values (if several), layers, heads (if given) and positions (unless "all"),
        float32 on the CPU, NaN where a shorter prompt has no such position; `clean` and `corrupted`, `[prompts]`.

    Raises:
        ValueError: Numbers or lengths of prompts do not match, or an argument is not one of its choices.
        IndexError: There is no such layer, head or position (the prompt's tokens are shown).
        Unavailable: The model, or a layer that was named, does not have the value.
        InsideTraceError: Called inside a trace of the same model.

        An error in the middle, KeyboardInterrupt included, carries a partial result as `error.partial`: NaN where its
        `done` is False.

    Example:
        clean, corrupted = "The capital of France is", "The capital of Italy is"
        metric = logit_difference(" Paris", " Rome")
        result = activation_patching(model, clean, corrupted, metric)
        print(result.tokens[0][int(result["scores"][0, 0].argmax())])  # → France
    """
    model.require_no_trace("activation_patching()")
    check_batch_size(batch_size)
    pairs = encode_pairs(model, clean, corrupted, direction, images=True)
    model.prepare(remote)
    names = [values] if isinstance(values, str) else listed(values, "values", "the name of a value, or several")
    if not names:
        raise ValueError("values is empty; give the name of a value, or several.")
    grid = Grid(model, pairs, names, layers, positions, heads)
    asked = {
        "prompts": ids_of(pairs.clean, pairs.corrupted),
        "values": names,
        "layers": grid.layers,
        "heads": grid.units,
        "positions": grid.where,
        "direction": direction,
    }
    call = Call(model, "activation_patching", asked, {"metric": metric})
    run = _Patching(model, grid, metric, batch_size, remote, resumed(call, resume))
    with bar(run.scores.numel(), "activation patching", progress) as shown, call.keeping(lambda: run.partial(call)):
        for start in range(0, len(pairs), PAIRS):
            run.some(range(start, min(start + PAIRS, len(pairs))), shown)
    return run.result()


class _Patching:
    """The runs of a call of `activation_patching`, and their metrics.

    Attributes:
        scores, done: The metric of each cell, `[prompts, values, layers, heads, positions]`, and whether it is there;
            cells that do not exist are done.
        ends: The metric of the run patched from and of the run patched into, `[2, prompts]`.
    """

    def __init__(
        self,
        model: StandardizedTransformer,
        grid: Grid,
        metric: Any,
        batch_size: BatchSize,
        remote: Any,
        earlier: Result | None = None,
    ) -> None:
        self.model, self.grid, self.pairs, self.metric = model, grid, grid.pairs, metric
        self.batch_size, self.remote = batch_size, remote
        self.shortcuts = proven_shortcuts(model, remote)
        self.scores = torch.full((len(self.pairs), *grid.shape), torch.nan, dtype=torch.float32)
        self.done = torch.zeros(self.scores.shape, dtype=torch.bool)
        for i, columns in enumerate(grid.where):
            self.done[i, ..., len(columns) :] = True
        self.missing = int(self.done.sum())  # cells that do not exist
        self.clean, self.corrupted = (torch.full((len(self.pairs),), torch.nan, dtype=torch.float32) for _ in range(2))
        self.ended = torch.zeros(len(self.pairs), dtype=torch.bool)
        self.earlier, self.last = earlier, (Kept(), (0, 0))  # what is kept of the sweep that runs, and which it is
        if earlier is not None:
            self.scores = earlier["scores"].view(self.scores.shape).clone()
            self.done = earlier[DONE].view(self.done.shape).clone()
            self.clean, self.corrupted = earlier["clean"].clone(), earlier["corrupted"].clone()
            self.ended = (self.corrupted if self.pairs.denoising else self.clean).isnan().logical_not()

    def some(self, chosen: range, shown: Any) -> None:
        """The cells of some pairs, one value at a time."""
        model, pairs, shortcuts, remote = self.model, self.pairs, self.shortcuts, self.remote
        into, source = [pairs.into[i] for i in chosen], [pairs.source[i] for i in chosen]
        bound: Any = None
        for v, name in enumerate(self.grid.names):
            finished = bool(self.done[list(chosen), v].all()) and (v > 0 or bool(self.ended[list(chosen)].all()))
            if finished and not held_of(self.earlier, (chosen.start, v)):
                shown.update(self.done[list(chosen), v].numel())
                continue
            keys = [(name, layer) for layer in self.grid.layers]
            states, source_logits = states_of(model, source, keys, shortcuts, remote)
            if bound is None:
                clean = source_logits if pairs.denoising else states_of(model, into, [], shortcuts, remote)[1]
                bound = bind_some(self.metric, model, len(pairs), clean, chosen)
                from_scores = self.clean if pairs.denoising else self.corrupted
                from_scores[list(chosen)] = by_prompt(bound, source_logits, list(range(len(chosen))))
            # The runs patched into, unedited, are the first cells of the first value.
            cells = [Cell(k, ()) for k in range(len(chosen))] if v == 0 else []
            places: list[tuple[int, ...]] = []
            for k, i in enumerate(chosen):
                for place, cell in self.grid.cells(i, k, name, states[k], shortcuts):
                    cells.append(cell)
                    places.append((i, v, *place))
            self.last = Kept(held=held_of(self.earlier, (chosen.start, v))), (chosen.start, v)
            self.run(into, chosen, cells, places, bound)
            shown.update(len(places))

    def run(
        self, into: list[Row], chosen: range, cells: list[Cell], places: list[tuple[int, ...]], bound: Bound
    ) -> None:
        """Run the cells of one value that are not done: one unedited for each pair or none, then those at `places`."""
        unedited, at = len(cells) - len(places), tuple(torch.tensor(places).T)
        ends, own = self.corrupted if self.pairs.denoising else self.clean, list(chosen)[:unedited]
        done = torch.cat([self.ended[own], self.done[at]])
        kept, _ = self.last
        kept.results["scores"] = torch.cat([ends[own], self.scores[at]])
        kept.done.update(done.nonzero()[:, 0].tolist())
        options: dict[str, Any] = {"remote": self.remote, "batch_size": self.batch_size, "progress": False}
        try:
            sweep(
                self.model, into, cells, scored(bound, cells), self.shortcuts, kept=kept, tokens=bound.tokens, **options
            )
        finally:
            found = kept.results["scores"]
            done[list(kept.done)] = True
            ends[own], self.ended[own] = found[:unedited], done[:unedited]
            self.scores[at], self.done[at] = found[unedited:], done[unedited:]

    def partial(self, call: Call) -> Result | None:
        """What is computed so far; None if that is nothing."""
        done, axes, *_ = self.grid.labelled(self.done)
        begun = bool(self.ended.any()) or int(self.done.sum()) > self.missing
        return unfinished(call, self.result, done, axes, *self.last, begun=begun)

    def result(self) -> PatchingResult:
        """The scores with labels."""
        scores, axes, labels, tokens = self.grid.labelled(self.scores)
        return PatchingResult(
            {"scores": scores, "clean": self.clean, "corrupted": self.corrupted},
            {"scores": axes, "clean": ("prompts",), "corrupted": ("prompts",)},
            labels,
            tokens,
            about=describe_run(
                self.model,
                "activation_patching",
                metric=metric_name(self.metric),
                values=self.grid.names,
                direction=self.pairs.direction,
                corrupted=prompt_labels(self.pairs.corrupted, self.model),
            ),
        )
