"""The sweep engine: cells are rows of batches, not runs.

Every cell is one prompt's forward pass with some edits. Cells run as rows of one batch, each with its own edits. What
the unedited run has in common with a cell is not computed again: positions before the first edited one come from the
key-value cache, layers before the first edited one are skipped, and logits are computed only where they are read. Each
shortcut is taken only where `nnterp.interventions._shortcuts` has proven it; otherwise the cells are rows of plain
forward passes. Rows of one batch have equal length, so nothing is padded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import nnsight
import torch

from nnterp.inputs import Row
from nnterp.interventions._edits import Cell, Edit, apply_edits, positions_axis, rows_of
from nnterp.interventions._passing import Passing, forward_steps
from nnterp.interventions._running import (
    AUTO_ROWS,
    AUTO_TOKENS,
    BatchSize,
    bar,
    check_batch_size,
    forward_flags,
    within_memory,
)
from nnterp.interventions._shortcuts import Shortcuts, continued, new_cache, prove, stored
from nnterp.interventions._tiles import Tile, plan
from nnterp.values import get_label, get_value, read_value

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer

READOUT_NUMBERS = 1 << 24  # logits that are held at a time
Reduce = Callable[[torch.Tensor, list[int]], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Base:
    """Unedited runs of prompts of one length.

    Attributes:
        ids: `[prompts, seq]`.
        streams: Residual stream after each layer, `[prompts, seq, hidden]` each; empty if no layer is to be skipped.
        cache: Keys and values of each layer, `[prompts, heads, seq, head_dim]`; None if no prefix is to be shared.
    """

    ids: torch.Tensor
    streams: tuple[torch.Tensor, ...] = ()
    cache: tuple[tuple[torch.Tensor, torch.Tensor], ...] | None = None


@torch.no_grad()
def sweep(
    model: StandardizedTransformer,
    rows: Sequence[Row],
    cells: Sequence[Cell],
    reduce: Reduce,
    *,
    read_at: Sequence[int] | None = None,
    remote: bool = False,
    batch_size: BatchSize = "auto",
    progress: bool | None = None,
    what: str = "sweep",
    shortcuts: Shortcuts | None = None,
) -> dict[str, torch.Tensor]:
    """Run every cell and return what `reduce` makes of each, in the order of the cells.

    Args:
        model: The model.
        rows: The prompts.
        cells: Prompts and edits.
        reduce: Called with float32 logits `[cells, vocab]` of some cells and their indices; returns named tensors
            `[cells, ...]`.
        read_at: For each prompt the position whose logits are read; the last if None.
        remote: Run on a remote service, where no shortcut is taken.
        batch_size: Rows of a batch; "auto" halves when memory runs out and goes on.
        progress: Show a progress bar; with None, only if the work lasts.
        what: What the bar says.
        shortcuts: What may be taken; decided by proof if None.

    Returns:
        `[cells, ...]` for each name, on the CPU.
    """
    check_batch_size(batch_size)
    model.prepare(remote)
    if shortcuts is None:
        shortcuts = Shortcuts() if remote else prove(model)
    at = [len(row) - 1 for row in rows] if read_at is None else list(read_at)
    run = _Run(model, rows, cells, reduce, at, remote, batch_size, shortcuts)
    with bar(len(cells), what, progress) as shown:
        run.everything(shown)
    return run.results


class _Run:
    def __init__(
        self,
        model: StandardizedTransformer,
        rows: Sequence[Row],
        cells: Sequence[Cell],
        reduce: Reduce,
        read_at: list[int],
        remote: bool,
        batch_size: BatchSize,
        shortcuts: Shortcuts,
    ) -> None:
        self.model, self.rows, self.cells, self.reduce = model, rows, cells, reduce
        self.read_at, self.remote, self.shortcuts = read_at, remote, shortcuts
        self.most_rows = AUTO_ROWS if batch_size == "auto" else batch_size
        self.most_tokens = AUTO_TOKENS if batch_size == "auto" else 1 << 60
        self.results: dict[str, torch.Tensor] = {}
        self.waiting: list[tuple[list[int], torch.Tensor]] = []  # cells and their last hidden states, not yet read out
        self.most_readouts = max(16, READOUT_NUMBERS // (model.vocab_size or 1 << 16))
        self.layers = model.num_layers

    def everything(self, shown: Any) -> None:
        """Groups of prompts of one length, a bounded number at a time."""
        of_prompt: dict[int, list[int]] = {}
        for i, cell in enumerate(self.cells):
            of_prompt.setdefault(cell.prompt, []).append(i)
        by_length: dict[int, list[int]] = {}
        for prompt in of_prompt:
            by_length.setdefault(len(self.rows[prompt]), []).append(prompt)
        for length in sorted(by_length, reverse=True):
            prompts = by_length[length]
            while prompts:
                size = max(1, min(self.most_rows, self.most_tokens // length))
                chosen = prompts[:size]
                indices = [i for prompt in chosen for i in of_prompt[prompt]]
                if not self.group(chosen, indices, length, shown):
                    self.most_rows = max(1, len(chosen) // 2)
                    continue
                prompts = prompts[size:]
        self.read_out()

    def group(self, prompts: list[int], indices: list[int], length: int, shown: Any) -> bool:
        """The cells of some prompts of one length; False if memory does not suffice for their unedited runs."""
        taken = self.shortcuts.within(length)
        begins = {i: self.begin(self.cells[i], taken) for i in indices}
        needs_stream = any(layer > 0 for _, layer in begins.values())
        needs_cache = any(position > 0 for position, _ in begins.values())
        place = {prompt: k for k, prompt in enumerate(prompts)}
        found: list[Base] = []
        if not within_memory(lambda: found.append(self.base(prompts, needs_stream, needs_cache)), len(prompts)):
            return False
        waiting = indices
        device = self.model._module.device.type
        while waiting:
            starts = [begins[i] for i in waiting]
            done: set[int] = set()
            for tile in plan(starts, length, self.layers, self.most_rows, self.most_tokens, device):
                own = replace(tile, cells=tuple(waiting[k] for k in tile.cells))
                which = torch.tensor([place[self.cells[i].prompt] for i in own.cells])
                if not within_memory(partial(self.tile, found[0], own, which), len(own.cells)):
                    self.most_rows = max(1, len(own.cells) // 2)
                    break
                done.update(own.cells)
                shown.update(len(own.cells))
            waiting = [i for i in waiting if i not in done]
        return True

    def begin(self, cell: Cell, taken: Shortcuts) -> tuple[int, int]:
        """The first position and layer that must run for a cell."""
        position = min(cell.first_position, self.read_at[cell.prompt]) if taken.prefix else 0
        layer = cell.first_layer(self.layers) if taken.skip else 0
        return position, layer

    def base(self, prompts: list[int], needs_stream: bool, needs_cache: bool) -> Base:
        """The unedited runs, as far as they are shared."""
        model = self.model
        ids = torch.tensor([self.rows[prompt].ids for prompt in prompts])
        if not needs_stream and not needs_cache:
            return Base(ids)
        cache = new_cache(model) if needs_cache else None
        flags = {"past_key_values": cache, "use_cache": True} if needs_cache else forward_flags(model)
        value = get_value("layers_output")
        with model.trace({"input_ids": ids}, **flags) as tracer:
            streams = []
            for layer in range(self.layers):
                stream = read_value(model, value, layer)
                if needs_stream:
                    streams.append(stream)
            nnsight.save(streams)
            tracer.stop()
        return Base(ids, tuple(streams), stored(cache) if cache is not None else None)

    def tile(self, base: Base, tile: Tile, which: torch.Tensor) -> None:
        """Run one batch and keep what is made of it."""
        if self.remote:
            self.tile_elsewhere(base, tile, which)
            return
        model, offset, start = self.model, tile.position, tile.layer
        size = (len(tile.cells), base.ids.shape[1] - offset)
        groups = self.edits_of(tile)
        at = torch.tensor([self.read_at[self.cells[i].prompt] - offset for i in tile.cells])
        entering: torch.Tensor | None = None
        if start > 0:
            entering = base.streams[start - 1][which.to(base.streams[start - 1].device), offset:]
            skipped = groups.pop(("layers_output", start - 1), None)
            if skipped:
                entering = apply_edits(entering, skipped, size, offset)
        if start == self.layers and not groups and self.shortcuts.readout:
            assert entering is not None
            self.wait(list(tile.cells), _at(entering, at, size[1], "layers_output"))
        else:
            ids = base.ids[which, offset:]
            flags = continued(model, base.cache, which, offset) if offset else forward_flags(model)
            reduce, layers, cells = self.reduce, self.layers, list(tile.cells)
            by_hidden = self.reads_hidden(groups)
            steps = forward_steps(model, groups)
            made: dict[str, torch.Tensor] = {}
            with model.trace({"input_ids": ids}, **flags) as tracer:
                if entering is not None:
                    model.skip_layers(0, start - 1, skip_with=entering)
                hidden = entering
                passing = Passing(model)
                for step in steps:
                    if step.term is not None:
                        passing.hold(step)
                        continue
                    new = passing.write(step.key, groups[step.key], size, offset)
                    if step.key == ("layers_output", layers - 1):
                        hidden = new
                if by_hidden:
                    if start < layers and ("layers_output", layers - 1) not in groups:
                        hidden = read_value(model, get_value("layers_output"), layers - 1)
                    last = _at(hidden, at, size[1], "layers_output").save()
                    tracer.stop()
                else:
                    made = nnsight.save(_on_cpu(reduce(_at(model.logits, at, size[1], "logits").float(), cells)))
            if by_hidden:
                self.wait(cells, last)  # many tiles are read out at once
            else:
                self.keep(cells, made)

    def tile_elsewhere(self, base: Base, tile: Tile, which: torch.Tensor) -> None:
        """Run one batch of whole prompts on a remote service, where what is made of the logits is made as well."""
        model, reduce, cells = self.model, self.reduce, list(tile.cells)
        ids, groups = base.ids[which], self.edits_of(tile)
        rows, seq = ids.shape
        at = torch.tensor([self.read_at[self.cells[i].prompt] for i in cells])
        steps = forward_steps(model, groups)
        with model.trace({"input_ids": ids}, remote=self.remote, **forward_flags(model)):
            passing = Passing(model)
            for step in steps:
                if step.term is not None:
                    passing.hold(step)
                else:
                    passing.write(step.key, groups[step.key], (rows, seq), 0)
            made = nnsight.save(_on_cpu(reduce(_at(model.logits, at, seq, "logits").float(), cells)))
        self.keep(cells, made)

    def wait(self, cells: list[int], hidden: torch.Tensor) -> None:
        """Hidden states `[cells, hidden]` are read out together with those of other tiles: the head is large."""
        self.waiting.append((cells, hidden))
        if sum(len(own) for own, _ in self.waiting) >= self.most_readouts:
            self.read_out()

    def read_out(self) -> None:
        """Make logits of the hidden states that wait, and of these what is asked for."""
        if not self.waiting:
            return
        cells = [i for own, _ in self.waiting for i in own]
        hidden = torch.cat([states.to(self.waiting[-1][1].device) for _, states in self.waiting])
        self.waiting = []
        start = 0
        while start < len(cells):
            some = slice(start, start + self.most_readouts)
            if not within_memory(partial(self.read_some, cells[some], hidden[some]), len(cells[some])):
                self.most_readouts = max(1, len(cells[some]) // 2)
                continue
            start += len(cells[some])

    def read_some(self, cells: list[int], hidden: torch.Tensor) -> None:
        """Logits of some cells' last hidden states."""
        self.keep(cells, self.reduce(self.model.project_on_vocab(hidden).float(), cells))

    def keep(self, cells: list[int], made: dict[str, torch.Tensor]) -> None:
        """Put what was made of some cells in its place."""
        for name, tensor in made.items():
            if name not in self.results:
                self.results[name] = torch.empty((len(self.cells), *tensor.shape[1:]), dtype=tensor.dtype)
            self.results[name][cells] = tensor.cpu()

    def reads_hidden(self, groups: dict[tuple[str, int | None], Any]) -> bool:
        """Whether logits can be made of the last layer's output at the positions that are read."""
        after = any(layer is None and get_value(name).rank > 0 for name, layer in groups)
        return self.shortcuts.readout and not after

    def edits_of(self, tile: Tile) -> dict[tuple[str, int | None], list[tuple[int, Edit]]]:
        """Edits with their rows, by value and layer."""
        groups: dict[tuple[str, int | None], list[tuple[int, Edit]]] = {}
        for row, i in enumerate(tile.cells):
            for edit in self.cells[i].edits:
                groups.setdefault((edit.value, edit.layer), []).append((row, edit))
        return groups


def _at(tensor: torch.Tensor, at: torch.Tensor, seq: int, name: str) -> torch.Tensor:
    """One position of each row: `[rows, ...]`."""
    if name != "logits":
        tensor = rows_of(tensor, len(at), seq, get_label(name))
        tensor = tensor.movedim(1 + positions_axis(name), 1)
    return tensor[torch.arange(len(at), device=tensor.device), at.to(tensor.device)]


def _on_cpu(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.cpu() for name, tensor in tensors.items()}
