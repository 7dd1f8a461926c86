"""The sweep engine: cells are rows of batches, not runs.

Every cell is one prompt's forward pass with some edits. Cells run as rows of one batch, each with its own edits. What
the unedited run has in common with a cell is not computed again: positions before the first edited one come from the
key-value cache, layers before the first edited one are skipped (rows join a running batch at the layer where they
begin), and logits are computed only where they are read. Each shortcut is taken only where
`nnterp.interventions._shortcuts` has proven it; otherwise the cells are rows of plain forward passes. Prompts of
different lengths share a batch, filled up on the right, where that is proven as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import nnsight
import torch

from nnterp.inputs import Row
from nnterp.interventions._batch import Base, Batch, BatchRun, Reduce, run_elsewhere
from nnterp.interventions._edits import Cell, axes_of
from nnterp.interventions._running import (
    AUTO_ROWS,
    AUTO_TOKENS,
    BatchSize,
    bar,
    check_batch_size,
    filled,
    forward_flags,
    is_out_of_memory,
    within_memory,
)
from nnterp.interventions._shortcuts import Shortcuts, new_cache, prove, stored
from nnterp.interventions._tiles import Span, plan
from nnterp.values import get_value, read_value

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer

READOUT_NUMBERS = 1 << 24  # logits that are held at a time, at most
READOUT_BATCHES = 4  # batches whose last hidden states wait for each other, at most


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
        shortcuts: What is taken, come what may; if None, what is proven, and less of it where an edit does not fit it.

    Returns:
        `[cells, ...]` for each name, on the CPU.
    """
    check_batch_size(batch_size)
    model.prepare(remote)
    yielding = shortcuts is None
    if shortcuts is None:
        shortcuts = Shortcuts() if remote else prove(model)
    at = [len(row) - 1 for row in rows] if read_at is None else list(read_at)
    run = _Run(model, rows, cells, reduce, at, remote, batch_size, shortcuts, yielding)
    with bar(len(cells), what, progress) as shown:
        run.everything(shown)
    return run.results


class _Again(Exception):
    """Cells that are left are to be run once more, with fewer shortcuts."""


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
        yielding: bool,
    ) -> None:
        self.model, self.rows, self.cells, self.reduce = model, rows, cells, reduce
        self.read_at, self.remote, self.shortcuts = read_at, remote, _fitting(shortcuts, cells)
        self.most_rows = AUTO_ROWS if batch_size == "auto" else batch_size
        self.most_tokens = AUTO_TOKENS if batch_size == "auto" else 1 << 60
        self.results: dict[str, torch.Tensor] = {}
        self.waiting: list[tuple[list[int], torch.Tensor]] = []  # cells and their last hidden states, not yet read out
        self.yielding = yielding
        self.done: set[int] = set()
        fitting = READOUT_NUMBERS // (model.vocab_size or 1 << 16)
        self.most_readouts = max(16, min(fitting, READOUT_BATCHES * self.most_rows))
        self.layers = model.num_layers

    def everything(self, shown: Any) -> None:
        """Groups of prompts, of one length where the model is not exact otherwise, a bounded number at a time."""
        of_prompt: dict[int, list[int]] = {}
        for i, cell in enumerate(self.cells):
            of_prompt.setdefault(cell.prompt, []).append(i)
        prompts = sorted(of_prompt, key=lambda prompt: -len(self.rows[prompt]))
        while prompts:
            longest = len(self.rows[prompts[0]])
            chosen = prompts[: max(1, min(self.most_rows, self.most_tokens // longest))]
            if not self.shortcuts.ragged:
                chosen = [prompt for prompt in chosen if len(self.rows[prompt]) == longest]
            try:
                enough = self.group(chosen, [i for prompt in chosen for i in of_prompt[prompt]], shown)
            except _Again:
                continue
            if not enough:
                self.most_rows = max(1, len(chosen) // 2)
                continue
            prompts = prompts[len(chosen) :]
        self.read_out()

    def group(self, prompts: list[int], indices: list[int], shown: Any) -> bool:
        """The cells of some prompts; False if memory does not suffice for their unedited runs."""
        length = max(len(self.rows[prompt]) for prompt in prompts)
        taken = self.shortcuts.within(length)
        spans = {i: self.span(self.cells[i], taken, length) for i in indices}
        needs_stream = any(span.layer > 0 for span in spans.values())
        needs_cache = any(span.position > 0 for span in spans.values())
        place = {prompt: k for k, prompt in enumerate(prompts)}
        found: list[Base] = []
        if not within_memory(
            lambda: found.append(self.base(prompts, needs_stream, needs_cache, taken.join)), len(prompts)
        ):
            return False
        waiting = [i for i in indices if i not in self.done]
        device = self.model._module.device.type
        while waiting:
            own_spans = [spans[i] for i in waiting]
            for tile in plan(own_spans, self.layers, self.most_rows, self.most_tokens, device, taken.join):
                own = [waiting[k] for k in tile.cells]
                cells = [self.cells[i] for i in own]
                which, at = [place[cell.prompt] for cell in cells], [self.read_at[cell.prompt] for cell in cells]
                batch = Batch(cells, own, which, at, tile.layers, tile.position, tile.end)
                if not within_memory(partial(self.batch, found[0], batch, taken), len(own)):
                    self.most_rows = max(1, len(own) // 2)
                    break
                self.done.update(own)
                shown.update(len(own))
            waiting = [i for i in waiting if i not in self.done]
        return True

    def span(self, cell: Cell, taken: Shortcuts, length: int) -> Span:
        """What must run for a cell."""
        at = self.read_at[cell.prompt]
        position = min(cell.first_position, at) if taken.prefix else 0
        layer = cell.first_layer(self.layers) if taken.skip else 0
        end = max(at, cell.last_position) + 1 if taken.ragged else length
        return Span(position, layer, end)

    def base(self, prompts: list[int], needs_stream: bool, needs_cache: bool, needs_first: bool) -> Base:
        """The unedited runs, as far as they are shared."""
        model = self.model
        ids = filled([self.rows[prompt] for prompt in prompts])
        if not needs_stream and not needs_cache:
            return Base(ids)
        cache = new_cache(model) if needs_cache else None
        flags = {"past_key_values": cache, "use_cache": True} if needs_cache else forward_flags(model)
        value = get_value("layers_output")
        with model.trace({"input_ids": ids}, **flags) as tracer:
            streams = []
            if needs_stream:
                streams.append(read_value(model, get_value("layers_input"), 0) if needs_first else None)
            for layer in range(self.layers):
                stream = read_value(model, value, layer)
                if needs_stream:
                    streams.append(stream)
            nnsight.save(streams)
            tracer.stop()
        return Base(ids, tuple(streams), stored(cache) if cache is not None else None)

    def batch(self, base: Base, batch: Batch, taken: Shortcuts) -> None:
        """Run one batch and keep what is made of it.

        Raises:
            _Again: It failed, and the values that are edited may not fit what was left out; now less is.
        """
        if self.remote:
            self.keep(list(batch.indices), run_elsewhere(self.model, base, batch, self.remote, self.reduce))
            return
        try:
            hidden, made = BatchRun(self.model, base, batch, taken).run(self.reduce)
        except Exception as error:
            plainer = replace(self.shortcuts, join=False, tail=False, ragged=False)
            if not self.yielding or is_out_of_memory(error) or plainer == self.shortcuts:
                raise
            self.shortcuts = plainer
            raise _Again from error
        if hidden is None:
            self.keep(list(batch.indices), made)
        else:
            self.wait(list(batch.indices), hidden)

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


def _fitting(shortcuts: Shortcuts, cells: Sequence[Cell]) -> Shortcuts:
    """Without those that edits of these values do not fit."""
    edits = [edit for cell in cells for edit in cell.edits]
    if any(edit.layer is None for edit in edits):  # before or after all layers
        shortcuts = replace(shortcuts, join=False)
    if any("key" in axes_of(get_value(edit.value)) for edit in edits):  # one entry for every position of the prompt
        shortcuts = replace(shortcuts, ragged=False)
    return shortcuts
