"""One batch of a sweep: cells as rows, each beginning at the layer at which it first differs from the unedited run."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import nnsight
import torch

from nnterp.inputs import forward_flags
from nnterp.interventions._engine._base import Base
from nnterp.interventions._engine._cache import continuing
from nnterp.interventions._engine._edits import Cell, Edit, Key, apply_edits, layer_of, positions_axis, rows_of
from nnterp.interventions._engine._passing import Passing, Step, forward_steps
from nnterp.interventions._engine._shortcuts import Shortcuts
from nnterp.values import get_label, get_value, read_value

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer

# From float32 logits [cells, vocab] and the indices of these cells to named tensors [cells, ...].
Reduce: TypeAlias = Callable[[torch.Tensor, list[int]], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class CellBatch:
    """Cells that run as the rows of one batch.

    Attributes:
        cells: The cells, in the order of `starts`.
        indices: Per cell: its index in the sweep.
        which: Per cell: index of its prompt in `Base.ids`.
        at: Per cell: the position whose logits are read.
        starts: Per cell: the first layer that runs; ascending.
        offset: The first position that runs; those before it come from the cache.
        end: The position before which the run ends.
    """

    cells: Sequence[Cell]
    indices: Sequence[int]
    which: Sequence[int]
    at: Sequence[int]
    starts: Sequence[int]
    offset: int
    end: int


class CellBatchRun:
    """The forward pass of one batch of cells, with the shortcuts in `taken`."""

    def __init__(self, model: StandardizedTransformer, base: Base, batch: CellBatch, taken: Shortcuts) -> None:
        self.model, self.base, self.batch, self.taken = model, base, batch, taken
        self.layers = model.num_layers
        self.seq = batch.end - batch.offset
        self.which = torch.tensor(list(batch.which))
        self.at = torch.tensor(list(batch.at)) - batch.offset
        self.first = batch.starts[0]
        self.joins = sorted(set(batch.starts)) if taken.join and batch.starts[-1] < self.layers else []
        # Per layer, how many rows run in it; None if all rows run in every layer that runs.
        self.counts = [bisect_right(batch.starts, layer) for layer in range(self.layers)] if self.joins else None
        self.entered: dict[int, list[tuple[int, Edit]]] = {}  # edits of the stream that rows begin with, by layer
        self.groups: dict[Key, list[tuple[int, Edit]]] = {}  # edits made while the batch runs, by value and layer
        for row, (cell, start) in enumerate(zip(batch.cells, batch.starts, strict=True)):
            for edit in cell.edits:
                if edit.value == "layers_output" and edit.layer == start - 1:
                    self.entered.setdefault(start, []).append((row, edit))
                else:
                    self.groups.setdefault((edit.value, edit.layer), []).append((row, edit))
        edits_readout = any(layer is None and get_value(name).rank > 0 for name, layer in self.groups)
        self.stops_early = taken.readout and not edits_readout
        self.narrowed: Key | None = ("mlps_input", self.layers - 1) if self.stops_early and self.narrows() else None

    def run(self, reduce: Reduce) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
        """Run the batch.

        Returns:
            The hidden states leaving the last layer at the positions that are read, `[rows, hidden]`, still to be
            projected on the vocabulary, and nothing else; or, where the readout is no shortcut for this model, None
            and what `reduce` returns for the logits.
        """
        model, at, seq, stops_early = self.model, self.at, self.seq, self.stops_early
        if self.first == self.layers and stops_early and not self.groups:  # no layer is left to run
            return at_positions(self.entering(self.first), at, seq, "layers_output"), {}
        steps = forward_steps(model, [*self.groups, *([self.narrowed] if self.narrowed else [])])
        inputs, flags, indices = self.base.given(self.which, self.ids()), self.flags(), list(self.batch.indices)
        made: dict[str, torch.Tensor] = {}
        last: torch.Tensor | None = None
        with model.trace(inputs, **flags) as tracer:
            hidden = self.pass_layers(Passing(model), steps)
            if stops_early:
                last = at_positions(hidden, at, seq, "layers_output").save()
                tracer.stop()
            else:
                made = nnsight.save(on_cpu(reduce(at_positions(model.logits, at, seq, "logits").float(), indices)))
        return last, made

    def ids(self) -> torch.Tensor:
        """Token ids that the forward pass is given; rows that join on the way bring a stream and need no ids."""
        return self.base.ids[self.which[:1] if self.joins else self.which, self.batch.offset : self.batch.end]

    def flags(self) -> dict[str, Any]:
        """Keywords of the forward pass: the cached prefix, if there is one."""
        if not self.batch.offset:
            return forward_flags(self.model)
        assert self.base.cache is not None
        return continuing(self.model, self.base.cache, self.which, self.batch.offset, self.counts)

    def pass_layers(self, passing: Passing, steps: list[Step]) -> torch.Tensor | None:
        """Inside the trace: skip layers, let rows join, make the edits.

        Returns:
            What leaves the last layer, if the forward pass stops there.
        """
        hidden = None
        if self.first > 0:
            hidden = self.entering(self.first)
            self.model.skip_layers(0, self.first - 1, skip_with=hidden[:1] if self.joins else hidden)
        done = 0
        for layer in self.joins:
            while done < len(steps) and layer_of(steps[done].key[1] or 0) < layer:
                hidden = self.step(passing, steps[done], hidden)
                done += 1
            self.join(layer)
        for step in steps[done:]:
            hidden = self.step(passing, step, hidden)
        leaving = ("layers_output", self.layers - 1)
        if self.stops_early and self.first < self.layers and leaving not in self.groups:
            hidden = passing.read(leaving)
        return hidden

    def step(self, passing: Passing, step: Step, hidden: torch.Tensor | None) -> torch.Tensor | None:
        """Do one step; returns what leaves the last layer if the step edits it, else `hidden`."""
        layer = step.key[1]
        if step.term is not None:
            passing.hold(step)
        elif step.key == self.narrowed:
            self.narrow(passing, step.key)
        else:
            rows = len(self.batch.cells) if self.counts is None or layer is None else self.counts[layer_of(layer)]
            size = rows, self.base.seq(step.key[0], self.seq)
            new = passing.write(step.key, self.groups[step.key], size, self.batch.offset)
            if step.key == ("layers_output", self.layers - 1):
                return new
        return hidden

    def entering(self, layer: int) -> torch.Tensor:
        """The residual stream with which rows begin at a layer, their edits of it made, `[rows, seq, hidden]`."""
        rows = [row for row, start in enumerate(self.batch.starts) if start == layer]
        stream = self.base.streams[layer]
        assert stream is not None
        whole = stream[self.which[rows].to(stream.device), self.batch.offset : self.batch.end]
        edits = [(row - rows[0], edit) for row, edit in self.entered.get(layer, [])]
        return apply_edits(whole, edits, (len(rows), self.seq), self.batch.offset) if edits else whole

    def join(self, layer: int) -> None:
        """Append the rows that begin at a layer to the rows that already run."""
        whole = self.entering(layer)
        if layer > self.first:
            running = read_value(self.model, get_value("layers_output"), layer - 1)
            whole = torch.cat([running, whole.to(running)])
        self.model.place("layers_input", layer).write(self.model, whole, f"layers_input[{layer}]")

    def narrows(self) -> bool:
        """Whether the last layer's MLP can run at the positions that are read alone: nothing in it is edited."""
        last = self.layers - 1
        if not self.taken.tail or self.seq == 1 or self.first > last or self.model.anatomy.blocks[last].mlp is None:
            return False
        rank = get_value("mlps_input").rank
        late = [name for name, at in self.groups if at is not None and layer_of(at) == last]
        return not any(get_value(name).rank >= rank for name in late)

    def narrow(self, passing: Passing, key: Key) -> None:
        """Give the last layer's MLP the read position of each row alone.

        Its output `[rows, 1, hidden]` is broadcast when it is added to the stream, so it is right at that position and
        wrong at the others, which nothing reads.
        """
        given = passing.read(key)
        if given.dim() != 3:
            raise ValueError("The MLP's input has batch and positions in one axis.")
        row = torch.arange(len(self.at), device=given.device)
        own = given[row, self.at.to(given.device)][:, None]
        self.model.place(key[0], key[1]).write(self.model, own, f"{key[0]}[{key[1]}]")


def run_remotely(
    model: StandardizedTransformer, base: Base, batch: CellBatch, remote: Any, reduce: Reduce
) -> dict[str, torch.Tensor]:
    """Run a batch of whole prompts on a remote service; `reduce` is called there, too."""
    indices, at = list(batch.indices), torch.tensor(list(batch.at))
    groups: dict[Key, list[tuple[int, Edit]]] = {}
    for row, cell in enumerate(batch.cells):
        for edit in cell.edits:
            groups.setdefault((edit.value, edit.layer), []).append((row, edit))
    which = torch.tensor(list(batch.which))
    ids, steps = base.ids[which], forward_steps(model, groups)
    rows, seq = ids.shape
    inputs = base.given(which, ids)
    with model.trace(inputs, remote=remote, **forward_flags(model)):
        passing = Passing(model)
        for step in steps:
            if step.term is not None:
                passing.hold(step)
            else:
                passing.write(step.key, groups[step.key], (rows, seq), 0)
        made = nnsight.save(on_cpu(reduce(at_positions(model.logits, at, seq, "logits").float(), indices)))
    return made


def at_positions(tensor: torch.Tensor, at: torch.Tensor, seq: int, name: str) -> torch.Tensor:
    """One position of each row of a value (or of the logits): `[rows, ...]`."""
    if name != "logits":
        tensor = rows_of(tensor, len(at), seq, get_label(name))
        tensor = tensor.movedim(1 + positions_axis(name), 1)
    return tensor[torch.arange(len(at), device=tensor.device), at.to(tensor.device)]


def on_cpu(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors on the CPU."""
    return {name: tensor.cpu() for name, tensor in tensors.items()}
