"""One batch of a sweep: rows that begin where they differ from the unedited run, each at its own layer."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import nnsight
import torch

from nnterp.interventions._edits import Cell, Edit, apply_edits, positions_axis, rows_of
from nnterp.interventions._passing import Key, Passing, Step, forward_steps
from nnterp.interventions._running import forward_flags
from nnterp.interventions._shortcuts import Shortcuts, continued
from nnterp.values import get_label, get_value, read_value

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer

Reduce = Callable[[torch.Tensor, list[int]], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Base:
    """Unedited runs of prompts; where they are of different lengths, the shorter ones are filled up on the right.

    Attributes:
        ids: `[prompts, seq]`.
        streams: Residual stream entering each layer and leaving the last, `[prompts, seq, hidden]` each; empty if no
            layer is to be skipped.
        cache: Keys and values of each layer, `[prompts, heads, seq, head_dim]`; None if no prefix is to be shared.
    """

    ids: torch.Tensor
    streams: tuple[torch.Tensor, ...] = ()
    cache: tuple[tuple[torch.Tensor, torch.Tensor], ...] | None = None


@dataclass(frozen=True)
class Batch:
    """Cells as rows.

    Attributes:
        cells: What is run, in the order of `starts`.
        indices: Which cells of the sweep these are.
        which: For each the place of its prompt in the base.
        at: For each the position whose logits are read.
        starts: For each the first layer that runs.
        offset, end: The positions that run.
    """

    cells: Sequence[Cell]
    indices: Sequence[int]
    which: Sequence[int]
    at: Sequence[int]
    starts: Sequence[int]
    offset: int
    end: int


class BatchRun:
    """A batch on its way through the model."""

    def __init__(self, model: StandardizedTransformer, base: Base, batch: Batch, taken: Shortcuts) -> None:
        self.model, self.base, self.batch, self.taken = model, base, batch, taken
        self.layers = model.num_layers
        self.seq = batch.end - batch.offset
        self.which = torch.tensor(list(batch.which))
        self.at = torch.tensor(list(batch.at)) - batch.offset
        self.first = batch.starts[0]
        self.joins = sorted(set(batch.starts)) if taken.join and batch.starts[-1] < self.layers else []
        self.entered: dict[int, list[tuple[int, Edit]]] = {}  # edits of what rows begin with, by layer
        self.groups: dict[Key, list[tuple[int, Edit]]] = {}  # edits on the way, by value and layer
        for row, (cell, start) in enumerate(zip(batch.cells, batch.starts, strict=True)):
            for edit in cell.edits:
                if edit.value == "layers_output" and edit.layer == start - 1:
                    self.entered.setdefault(start, []).append((row, edit))
                else:
                    self.groups.setdefault((edit.value, edit.layer), []).append((row, edit))

    def run(self, reduce: Reduce) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
        """Hidden states of the last layer where they are read, `[rows, hidden]`, which wait to be read out; or, where
        that is not proven to give the logits, what `reduce` makes of them."""
        model, at = self.model, self.at
        by_hidden = self.taken.readout and not any(
            layer is None and get_value(name).rank > 0 for name, layer in self.groups
        )
        if self.first == self.layers and by_hidden and not self.groups:
            return at_positions(self.entering(self.first), at, self.seq, "layers_output"), {}
        narrowed = ("mlps_input", self.layers - 1) if by_hidden and self.narrows() else None
        steps = forward_steps(model, [*self.groups, *([narrowed] if narrowed else [])])
        counts = [bisect_right(self.batch.starts, layer) for layer in range(self.layers)] if self.joins else None
        which, offset, end, seq = self.which, self.batch.offset, self.batch.end, self.seq
        ids = self.base.ids[which[:1] if self.joins else which, offset:end]
        flags = continued(model, self.base.cache, which, offset, counts) if offset else forward_flags(model)
        first, layers, indices, joins = self.first, self.layers, list(self.batch.indices), self.joins
        made: dict[str, torch.Tensor] = {}
        last: torch.Tensor | None = None
        with model.trace({"input_ids": ids}, **flags) as tracer:
            passing = Passing(model)
            hidden = None
            if first > 0:
                hidden = self.entering(first)
                model.skip_layers(0, first - 1, skip_with=hidden[:1] if joins else hidden)
            done = 0
            for layer in joins:
                while done < len(steps) and (steps[done].key[1] or 0) < layer:
                    hidden = self.step(passing, steps[done], narrowed, counts, hidden)
                    done += 1
                self.join(layer)
            for step in steps[done:]:
                hidden = self.step(passing, step, narrowed, counts, hidden)
            if by_hidden:
                if first < layers and ("layers_output", layers - 1) not in self.groups:
                    hidden = passing.read(("layers_output", layers - 1))
                last = at_positions(hidden, at, seq, "layers_output").save()
                tracer.stop()
            else:
                made = nnsight.save(on_cpu(reduce(at_positions(model.logits, at, seq, "logits").float(), indices)))
        return last, made  # many batches are read out at once

    def step(
        self,
        passing: Passing,
        step: Step,
        narrowed: Key | None,
        counts: list[int] | None,
        hidden: torch.Tensor | None,
    ) -> torch.Tensor | None:
        """Do one step; returns what leaves the last layer, once it is edited."""
        layer = step.key[1]
        if step.term is not None:
            passing.hold(step)
        elif step.key == narrowed:
            self.narrow(passing)
        else:
            rows = len(self.batch.cells) if counts is None or layer is None else counts[layer]
            new = passing.write(step.key, self.groups[step.key], (rows, self.seq), self.batch.offset)
            if step.key == ("layers_output", self.layers - 1):
                return new
        return hidden

    def entering(self, layer: int) -> torch.Tensor:
        """What rows that begin at a layer begin with, `[rows, seq, hidden]`."""
        rows = [row for row, start in enumerate(self.batch.starts) if start == layer]
        stream = self.base.streams[layer]
        whole = stream[self.which[rows].to(stream.device), self.batch.offset : self.batch.end]
        edits = [(row - rows[0], edit) for row, edit in self.entered.get(layer, [])]
        return apply_edits(whole, edits, (len(rows), self.seq), self.batch.offset) if edits else whole

    def join(self, layer: int) -> None:
        """Rows that begin at a layer are put under those that run already."""
        whole = self.entering(layer)
        if layer > self.first:
            running = read_value(self.model, get_value("layers_output"), layer - 1)
            whole = torch.cat([running, whole.to(running)])
        self.model.place("layers_input", layer).write(self.model, whole, f"layers_input[{layer}]")

    def narrows(self) -> bool:
        """Whether the last feed-forward may run at the positions alone that are read."""
        last = self.layers - 1
        if not self.taken.tail or self.seq == 1 or self.first > last or self.model.anatomy.blocks[last].mlp is None:
            return False
        rank = get_value("mlps_input").rank
        return not any(layer == last and get_value(name).rank >= rank for name, layer in self.groups)

    def narrow(self, passing: Passing) -> None:
        """Give the last feed-forward one position of each row; its one output is added at all of them."""
        key = ("mlps_input", self.layers - 1)
        given = passing.read(key)
        if given.dim() != 3:
            raise ValueError("the feed-forward is given batch and positions in one axis")
        row = torch.arange(len(self.at), device=given.device)
        own = given[row, self.at.to(given.device)][:, None]
        self.model.place(key[0], key[1]).write(self.model, own, f"{key[0]}[{key[1]}]")


def run_elsewhere(
    model: StandardizedTransformer, base: Base, batch: Batch, remote: bool, reduce: Reduce
) -> dict[str, torch.Tensor]:
    """Run a batch of whole prompts on a remote service, where what is made of the logits is made as well."""
    indices, at = list(batch.indices), torch.tensor(list(batch.at))
    groups: dict[Key, list[tuple[int, Edit]]] = {}
    for row, cell in enumerate(batch.cells):
        for edit in cell.edits:
            groups.setdefault((edit.value, edit.layer), []).append((row, edit))
    ids, steps = base.ids[torch.tensor(list(batch.which))], forward_steps(model, groups)
    rows, seq = ids.shape
    with model.trace({"input_ids": ids}, remote=remote, **forward_flags(model)):
        passing = Passing(model)
        for step in steps:
            if step.term is not None:
                passing.hold(step)
            else:
                passing.write(step.key, groups[step.key], (rows, seq), 0)
        made = nnsight.save(on_cpu(reduce(at_positions(model.logits, at, seq, "logits").float(), indices)))
    return made


def at_positions(tensor: torch.Tensor, at: torch.Tensor, seq: int, name: str) -> torch.Tensor:
    """One position of each row: `[rows, ...]`."""
    if name != "logits":
        tensor = rows_of(tensor, len(at), seq, get_label(name))
        tensor = tensor.movedim(1 + positions_axis(name), 1)
    return tensor[torch.arange(len(at), device=tensor.device), at.to(tensor.device)]


def on_cpu(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors moved to the CPU."""
    return {name: tensor.cpu() for name, tensor in tensors.items()}
