"""Activation patching: which activations of one prompt, put into another, carry what differs between the two."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from nnterp.inputs import Row, encode
from nnterp.interventions._edits import Cell, Edit, index_of
from nnterp.interventions._metrics import bind_some, by_prompt, metric_name, scored
from nnterp.interventions._results import Result, describe_run, prompt_labels, token_texts
from nnterp.interventions._running import BatchSize, bar, check_batch_size
from nnterp.interventions._shortcuts import prove
from nnterp.interventions._states import States, states_of
from nnterp.interventions._sweep import sweep
from nnterp.interventions._units import layers_with, units_of
from nnterp.positions import Positions, resolve

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer

Direction = Literal["denoising", "noising"]
PAIRS = 8  # pairs of prompts whose activations are held at a time


@dataclass(frozen=True, eq=False, repr=False)
class PatchingResult(Result):
    """The metric of each patched run, `scores`, with that of the unpatched `clean` and `corrupted` runs `[prompts]`."""

    figure: ClassVar[str] = "patching"

    def normalized(self) -> PatchingResult:
        """Scores on the scale on which the run patched into is 0 and the run patched from is 1.

        Where the two do not differ, NaN.
        """
        clean, corrupted = self["clean"], self["corrupted"]
        into, source = (corrupted, clean) if self.about["arguments"]["direction"] == "denoising" else (clean, corrupted)
        shape = (-1,) + (1,) * (self["scores"].dim() - 1)
        gap = torch.where(source == into, torch.nan, source - into)
        scores = (self["scores"] - into.view(shape)) / gap.view(shape)
        return replace(self, tensors={**self.tensors, "scores": scores})


def activation_patching(
    model: StandardizedTransformer,
    clean: Any,
    corrupted: Any,
    metric: Any,
    values: str | Sequence[str] = "layers_output",
    layers: int | Sequence[int] | None = None,
    positions: Positions | Literal["all"] = None,
    heads: int | Sequence[int] | Literal["all"] | None = None,
    direction: Direction = "denoising",
    *,
    batch_size: BatchSize = "auto",
    progress: bool | None = None,
    remote: Any = False,
) -> PatchingResult:
    """Run one prompt once for each layer, position or head, with this one activation taken from another prompt's run.

    Every cell is exactly a forward pass of its own (see `nnterp.interventions._sweep` for what is shared). (Vig et al.,
    2020; Meng et al., 2022, "causal tracing"; Heimersheim and Nanda, "How to use and interpret activation patching",
    2024.)

    Args:
        model: The model.
        clean: A prompt, or a list.
        corrupted: As many prompts, one for each clean one.
        metric: `logit_difference(...)`, `target_probability(...)`, `kl_divergence()`, or a function of the next-token
            logits `[n, vocab]` of n runs that returns n numbers.
        values: What is patched: a name of the table of values, or several ("layers_output" for the residual stream,
            "attention_contributions", "mlp_contributions", "attention_head_outputs", "attention_probabilities", ...).
        layers: The layer or layers; all that have the value if None.
        positions: One column for each: positions over the prompts' own tokens, or text selectors (an entry that stands
            for several positions is patched at once); None for every position alone, "all" for all of them at once
            (also what None means where `heads` are given).
        heads: Patch single heads (or neurons, for values that have them): indices or "all".
        direction: "denoising" puts activations of the clean run into the corrupted one, "noising" the reverse.
        batch_size: Rows of a batch; "auto" halves when memory runs out and goes on.
        progress: Show a progress bar; with None, only if the work lasts.
        remote: Run on the remote service, the metric with it; what is patched in is fetched first.

    Returns:
        `scores` with the axes prompts, values (if several), layers, heads (if given) and positions (unless "all"),
        float32 on the CPU, NaN where a shorter prompt has no such position; `clean` and `corrupted`, `[prompts]`.

    Raises:
        ValueError: Numbers or lengths of prompts do not match, or an argument is none of its choices.
        IndexError: There is no such layer, head or position (the prompt's tokens are shown).
        Unavailable: The model, or a layer that was named, does not have the value.
        InsideTraceError: Called inside a trace of the same model.
    """
    model.require_no_trace("activation_patching()")
    check_batch_size(batch_size)
    if direction not in ("denoising", "noising"):
        raise ValueError(f'direction is "denoising" or "noising", not {direction!r}.')
    pair = encode(model, clean), encode(model, corrupted)
    if len(pair[0]) != len(pair[1]):
        raise ValueError(f"{len(pair[0])} clean prompts and {len(pair[1])} corrupted ones; they go in pairs.")
    model.prepare(remote)
    names = [values] if isinstance(values, str) else list(values)
    grid = _Grid(model, pair, names, layers, positions, heads, direction)
    scores = torch.full((len(pair[0]), *grid.shape), float("nan"))
    runs = torch.empty(2, len(pair[0]))
    total = len(pair[0]) * len(names) * len(grid.layers) * len(grid.units) * grid.width
    with bar(total, "activation patching", progress) as shown:
        for start in range(0, len(pair[0]), PAIRS):
            grid.some(range(start, min(start + PAIRS, len(pair[0]))), metric, scores, runs, batch_size, shown, remote)
    return grid.result(scores, runs, metric)


class _Grid:
    """The cells of a call of `activation_patching`."""

    def __init__(
        self,
        model: StandardizedTransformer,
        pair: tuple[list[Row], list[Row]],
        names: list[str],
        layers: int | Sequence[int] | None,
        positions: Any,
        heads: Any,
        direction: Direction,
    ) -> None:
        self.model, self.names, self.direction = model, names, direction
        self.clean, self.corrupted = pair
        self.into, self.source = (pair[1], pair[0]) if direction == "denoising" else (pair[0], pair[1])
        self.layers = layers_with(model, names, layers)
        self.units = units_of(model, names, heads, self.layers)
        self.by_head = heads is not None
        together = positions == "all" if isinstance(positions, str) else positions is None and self.by_head
        if isinstance(positions, str) and positions != "all":
            raise ValueError(f'positions are indices, selectors such as at(...), or "all"; not {positions!r}.')
        self.together = together
        self.columns: list[Any] | None = None
        if not together and positions is not None:
            listed = isinstance(positions, Sequence)
            self.columns = list(positions) if listed else [positions]
            if not self.columns:
                raise ValueError("positions is empty; give at least one, or None for every position.")
        self.where = [self._where(i) for i in range(len(self.into))]
        self.width = max(len(columns) for columns in self.where)
        self.shape = (len(names), len(self.layers), len(self.units), self.width)

    def _where(self, prompt: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """For each column the positions in the run patched into, and in the one patched from."""
        into, source = self.into[prompt], self.source[prompt]
        if self.columns is None:
            if len(into) != len(source):
                raise ValueError(
                    f"Pair {prompt}: the clean prompt has {len(self.clean[prompt])} tokens and the corrupted one "
                    f"{len(self.corrupted[prompt])}, so their positions do not correspond; make them equally long, or "
                    f"give positions that are found in both, such as nnterp.positions.last_of(...)."
                )
            every = tuple(range(len(into)))
            return [(every, every)] if self.together else [((p,), (p,)) for p in every]
        found = []
        kind = {"denoising": ("corrupted", "clean"), "noising": ("clean", "corrupted")}[self.direction]
        for column in self.columns:
            a = resolve(self.model, into, column, f"the {kind[0]} prompt {prompt}")
            b = resolve(self.model, source, column, f"the {kind[1]} prompt {prompt}")
            if len(a) != len(b):
                raise ValueError(
                    f"Pair {prompt}: {column!r} is {len(a)} tokens of the {kind[0]} prompt and {len(b)} of the "
                    f"{kind[1]} one; give positions that are equally many in both."
                )
            if not a:
                raise ValueError(f"Pair {prompt}: {column!r} is no token of the prompt.")
            found.append((a, b))
        return found

    def some(
        self,
        chosen: range,
        metric: Any,
        scores: torch.Tensor,
        runs: torch.Tensor,
        batch_size: BatchSize,
        shown: Any,
        remote: Any,
    ) -> None:
        """The cells of some pairs, one value at a time."""
        model = self.model
        into, source = [self.into[i] for i in chosen], [self.source[i] for i in chosen]
        denoising, own = self.direction == "denoising", list(range(len(chosen)))
        for v, name in enumerate(self.names):
            states, from_logits = states_of(model, source, [(name, layer) for layer in self.layers], remote)
            cells: list[Cell] = []
            places = []
            if v == 0:
                clean_logits = from_logits if denoising else states_of(model, into, [], remote)[1]
                bound = bind_some(metric, model, len(self.clean), clean_logits, chosen)
                runs[0 if denoising else 1, list(chosen)] = by_prompt(bound, from_logits, own)
                cells += [Cell(k, ()) for k in own]  # as it was
            for k, i in enumerate(chosen):
                for place, cell in self.cells(i, k, name, states[k]):
                    cells.append(cell)
                    places.append((i, v, *place))

            reduce = scored(bound, cells)
            found = sweep(model, into, cells, reduce, remote=remote, batch_size=batch_size, progress=False)["scores"]
            if v == 0:
                runs[1 if denoising else 0, list(chosen)] = found[: len(own)]
            scores[tuple(torch.tensor(places).T)] = found[len(found) - len(places) :]
            shown.update(len(places))

    def cells(self, pair: int, prompt: int, name: str, states: States) -> Iterator[tuple[tuple[int, ...], Cell]]:
        """Each cell of one pair and one value, with its place in the grid."""
        same = self._same_prefix(pair)
        for (a, layer), (b, unit), (c, (at, at_source)) in product(
            enumerate(self.layers), enumerate(self.units), enumerate(self.where[pair])
        ):
            kept = [k for k, position in enumerate(at) if position >= same or at != at_source]
            if not kept:  # both runs are equal up to here
                yield (a, b, c), Cell(prompt, ())
                continue
            heads = None if unit is None else (unit,)
            there = Edit(name, layer, tuple(at_source[k] for k in kept), lambda x: x, heads)
            source = states[name, layer]
            new = source[index_of(there, 0, source.device)]
            yield (a, b, c), Cell(prompt, (Edit(name, layer, tuple(at[k] for k in kept), new, heads),))

    def _same_prefix(self, pair: int) -> int:
        """Up to where the two runs are equal, in a model proven not to look ahead."""
        into, source = self.into[pair].ids, self.source[pair].ids
        if not prove(self.model).within(len(into)).prefix:
            return 0
        return next(
            (i for i, (a, b) in enumerate(zip(into, source, strict=False)) if a != b), min(len(into), len(source))
        )

    def result(self, scores: torch.Tensor, runs: torch.Tensor, metric: Any) -> PatchingResult:
        """With labels; axes that were not asked for are left out."""
        model = self.model
        axes = ["prompts", "values", "layers", "heads", "positions"]
        labels: dict[str, tuple[Any, ...]] = {
            "prompts": prompt_labels(self.clean, model),
            "values": tuple(self.names),
            "layers": tuple(self.layers),
            "heads": tuple(self.units),
            "positions": tuple(range(self.width)),
        }
        tokens: tuple[tuple[str | None, ...], ...] = ()
        if self.columns is not None:
            labels["positions"] = tuple(c if isinstance(c, int) else repr(c) for c in self.columns)
        if not self.together:
            tokens = tuple(self._tokens(i) for i in range(len(self.clean)))
        left_out = {"values": len(self.names) == 1, "heads": not self.by_head, "positions": self.together}
        for axis in [axis for axis in axes if left_out.get(axis)]:
            scores = scores.squeeze(axes.index(axis))
            axes.remove(axis)
            labels.pop(axis)
        return PatchingResult(
            {"scores": scores, "clean": runs[0], "corrupted": runs[1]},
            {"scores": tuple(axes), "clean": ("prompts",), "corrupted": ("prompts",)},
            labels,
            tokens,
            about=describe_run(
                model,
                "activation_patching",
                metric=metric_name(metric),
                values=self.names,
                direction=self.direction,
                corrupted=prompt_labels(self.corrupted, model),
            ),
        )

    def _tokens(self, prompt: int) -> tuple[str | None, ...]:
        """The clean prompt's tokens in each column."""
        side = 1 if self.direction == "denoising" else 0
        ids = self.clean[prompt].ids
        own = ["".join(token_texts(self.model, [ids[p] for p in pair[side]])) for pair in self.where[prompt]]
        return (*own, *(None,) * (self.width - len(own)))
