"""Running all cells of a sweep: prompts in groups, their cells in batches, what is shared computed once."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from nnterp.devices import input_device
from nnterp.errors import Unavailable
from nnterp.inputs import Row, sharing_first
from nnterp.interventions._engine._base import Base, base_of, run_base
from nnterp.interventions._engine._batch import CellBatch, CellBatchRun, Reduce, run_remotely
from nnterp.interventions._engine._edits import Cell
from nnterp.interventions._engine._kept import Kept
from nnterp.interventions._engine._readouts import Readouts
from nnterp.interventions._engine._shortcuts import Shortcuts
from nnterp.interventions._engine._tiles import Span, Tile, plan
from nnterp.interventions._running import (
    AUTO_ROWS,
    AUTO_TOKENS,
    BatchSize,
    bar,
    check_batch_size,
    is_out_of_memory,
    within_memory,
)

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer


@torch.no_grad()
def sweep(
    model: StandardizedTransformer,
    prompts: Sequence[Row],
    cells: Sequence[Cell],
    reduce: Reduce,
    shortcuts: Shortcuts,
    *,
    fall_back: bool = True,
    read_at: Sequence[int] | None = None,
    remote: Any = False,
    batch_size: BatchSize = "auto",
    progress: bool | None = None,
    what: str = "sweep",
    kept: Kept | None = None,
    streams: Sequence[Sequence[torch.Tensor]] = (),
    tokens: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Run every cell and return what `reduce` makes of its logits, in the order of the cells.

    Args:
        model: The model.
        prompts: The prompts, to which cells refer by index.
        cells: Prompts and edits.
        reduce: Called with float32 logits `[n, vocab]` of n cells and their indices; returns named tensors `[n, ...]`.
        shortcuts: What is left out of a cell's run. They are not checked: pass those that are proven for the model.
        fall_back: If a batch fails, run the cells that are left without `join`, `tail` and `ragged`: shortcuts that
            are exact for the model may not fit the value that is edited. With False, the error is raised at once.
        read_at: For each prompt the position whose logits are read; the last if None.
        remote: Run on a remote service. The service takes no shortcuts: pass `Shortcuts()`.
        batch_size: Rows of a batch; "auto" halves when memory runs out and goes on.
        progress: Show a progress bar; with None, only if the work lasts.
        what: What the bar says.
        kept: Filled in as cells are finished, so that they outlive an error. Batches of cells that are done in it are
            not run; the others are the batches of a sweep that begins anew.
        streams: For each prompt the residual stream of its unedited run entering each layer and leaving the last,
            `[seq, hidden]` each, if the caller has it; empty if not.
        tokens: Ids of the only tokens whose logits `reduce` reads; the others may be NaN. None if it reads all.

    Returns:
        `[cells, ...]` for each name, on the CPU.

    Raises:
        ValueError: `batch_size` is neither "auto" nor positive.
        ShapeError: An edit does not have the shape of what it replaces.
    """
    check_batch_size(batch_size)
    model.prepare(remote)
    at = [len(prompt) - 1 for prompt in prompts] if read_at is None else list(read_at)
    kept = Kept() if kept is None else kept
    run = _Sweep(model, prompts, cells, reduce, at, remote, batch_size, shortcuts, fall_back, kept, streams, tokens)
    with bar(len(cells), what, progress) as shown:
        try:
            run.everything(shown)
        except BaseException:
            run.readouts.rescue()
            raise
    return kept.results


class _Again(Exception):
    """A batch failed; the cells that are left are to be run with fewer shortcuts."""


def _may_be_of_a_shortcut(error: Exception) -> bool:
    """Whether an error may come from rows that do not stand where a value's shape says; others are the user's."""
    if is_out_of_memory(error):
        return False
    if isinstance(error, (LookupError, ValueError, TypeError, AssertionError, Unavailable)):
        return True
    return isinstance(error, RuntimeError) and re.search(r"size|shape|dim|index|expand|numel", str(error)) is not None


class _Sweep:
    def __init__(
        self,
        model: StandardizedTransformer,
        prompts: Sequence[Row],
        cells: Sequence[Cell],
        reduce: Reduce,
        read_at: list[int],
        remote: Any,
        batch_size: BatchSize,
        shortcuts: Shortcuts,
        fall_back: bool,
        kept: Kept,
        streams: Sequence[Sequence[torch.Tensor]],
        tokens: torch.Tensor | None,
    ) -> None:
        self.model, self.prompts, self.cells, self.reduce = model, prompts, cells, reduce
        self.read_at, self.remote, self.fall_back = read_at, remote, fall_back
        self.streams = streams
        self.shortcuts = shortcuts.fitting(cells)
        self.most_rows = AUTO_ROWS if batch_size == "auto" else batch_size
        self.most_tokens = AUTO_TOKENS if batch_size == "auto" else 1 << 60
        self.readouts = Readouts(model, len(cells), reduce, self.most_rows, kept, tokens)
        self.finished, self.held = frozenset(kept.done), kept.held  # before this run
        self.done: set[int] = set()
        self.layers = model.num_layers

    def everything(self, shown: Any) -> None:
        """All cells, a group of prompts at a time, longest first; of one length unless lengths may be mixed."""
        of_prompt: dict[int, list[int]] = {}
        for i, cell in enumerate(self.cells):
            of_prompt.setdefault(cell.prompt, []).append(i)
        left = sorted(of_prompt, key=lambda prompt: -len(self.prompts[prompt]))
        while left:
            longest = len(self.prompts[left[0]])
            both = self.prompts[left[0]].lengths
            chosen = left[: max(1, min(self.most_rows, self.most_tokens // longest))]
            if self.shortcuts.ragged:
                chosen = sharing_first(self.model, self.prompts, chosen)
            else:
                chosen = [prompt for prompt in chosen if self.prompts[prompt].lengths == both]
                chosen = sharing_first(self.model, self.prompts, chosen)
            try:
                enough = self.group(chosen, [i for prompt in chosen for i in of_prompt[prompt]], shown)
            except _Again:
                continue
            if not enough:
                self.most_rows = max(1, len(chosen) // 2)
                continue
            left = left[len(chosen) :]
        self.readouts.read_out()

    def group(self, chosen: list[int], indices: list[int], shown: Any) -> bool:
        """Run the cells of some prompts; False if there is not enough memory for their unedited runs."""
        if self.finished.issuperset(indices) and self.held.keys().isdisjoint(indices):
            shown.update(len(indices))
            return True
        prompts = [self.prompts[prompt] for prompt in chosen]
        length = max(len(prompt) for prompt in prompts)
        with_images = prompts[0].images is not None
        # Shortcuts are proven on texts: positions, masks and what a tower adds between layers are others with an image.
        plain = Shortcuts(reasons=("the prompt has an image",))
        taken = plain if with_images else self.shortcuts.within(length, self.model.facts.thresholds.limit)
        vision = self.model.facts.vision
        most = 1 if with_images and (vision is None or not vision.copies) else self.most_rows
        spans = {i: self.span(self.cells[i], taken, length) for i in indices}
        needs_streams = any(span.layer > 0 for span in spans.values())
        needs_cache = any(span.position > 0 and self.runs(self.cells[i], span, taken) for i, span in spans.items())
        found: list[Base] = []
        own = [self.streams[prompt] for prompt in chosen if prompt < len(self.streams)]
        if needs_streams and not needs_cache and len(own) == len(chosen) and all(map(len, own)):
            found.append(base_of(prompts, own))
        elif not within_memory(
            lambda: found.append(run_base(self.model, prompts, needs_streams, needs_cache, taken.join)), len(prompts)
        ):
            return False
        place = {prompt: k for k, prompt in enumerate(chosen)}
        device = input_device(self.model._module).type
        while waiting := [i for i in indices if i not in self.done]:
            own_spans = [spans[i] for i in waiting]
            for tile in plan(own_spans, self.layers, min(most, self.most_rows), self.most_tokens, device, taken.join):
                batch = self.batch(tile, [waiting[k] for k in tile.cells], place)
                if self.held.keys() >= set(batch.indices):
                    self.readouts.hold(list(batch.indices), torch.stack([self.held[i] for i in batch.indices]))
                elif not self.finished.issuperset(batch.indices) and not within_memory(
                    partial(self.run, found[0], batch, taken), len(batch.cells)
                ):
                    self.most_rows = max(1, len(batch.cells) // 2)
                    break
                self.done.update(batch.indices)
                shown.update(len(batch.cells))
        return True

    def span(self, cell: Cell, taken: Shortcuts, length: int) -> Span:
        """The positions and layers that must run for a cell."""
        at = self.read_at[cell.prompt]
        position = min(cell.first_position, at) if taken.prefix else 0
        layer = cell.first_layer(self.layers) if taken.skip else 0
        end = max(at, cell.last_position) + 1 if taken.ragged else length
        sharing, own = self.model.sharing, len(self.prompts[cell.prompt])
        if sharing.side(end) != sharing.side(own):  # the positions left out decide how the others are computed
            end = own
        return Span(position, layer, end)

    def runs(self, cell: Cell, span: Span, taken: Shortcuts) -> bool:
        """Whether anything is left to run for a cell: not if nothing is edited and the stream is read out as it is."""
        return bool(cell.edits) or span.layer < self.layers or not taken.readout

    def batch(self, tile: Tile, indices: list[int], place: dict[int, int]) -> CellBatch:
        """The batch of a tile's cells; `place` is where each prompt stands in the unedited runs."""
        cells = [self.cells[i] for i in indices]
        which, at = [place[cell.prompt] for cell in cells], [self.read_at[cell.prompt] for cell in cells]
        return CellBatch(cells, indices, which, at, tile.layers, tile.position, tile.end)

    def run(self, base: Base, batch: CellBatch, taken: Shortcuts) -> None:
        """Run one batch and keep what is made of it.

        Raises:
            _Again: It failed, and there were shortcuts that may not fit the edits; they are dropped now.
        """
        indices = list(batch.indices)
        if self.remote:
            self.readouts.keep(indices, run_remotely(self.model, base, batch, self.remote, self.reduce))
            return
        try:
            hidden, made = CellBatchRun(self.model, base, batch, taken).run(self.reduce)
        except Exception as error:
            fewer = replace(self.shortcuts, join=False, tail=False, ragged=False)
            if not self.fall_back or not _may_be_of_a_shortcut(error) or fewer == self.shortcuts:
                raise
            self.shortcuts = fewer
            raise _Again from error
        if hidden is None:
            self.readouts.keep(indices, made)
        else:
            self.readouts.hold(indices, hidden)
