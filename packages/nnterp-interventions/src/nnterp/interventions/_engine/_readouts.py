"""Logits of the last hidden states of cells, for several batches at once, and what is made of them."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING

import torch

from nnterp.interventions._engine._batch import Reduce
from nnterp.interventions._engine._kept import Kept
from nnterp.interventions._running import within_memory

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer

READOUT_NUMBERS = 1 << 24  # logits that are held at a time, at most
FEW = 8  # tokens are read out alone if they are at most this part of the vocabulary: an eighth
READOUT_BATCHES = 4  # batches whose hidden states are held back to be read out together, at most


class Readouts:
    """What a sweep returns, filled in cell by cell.

    The matrix of the vocabulary is large, and reading it costs the same for few hidden states as for many; so the
    hidden states of several batches are held back and projected together.
    """

    def __init__(
        self,
        model: StandardizedTransformer,
        cells: int,
        reduce: Reduce,
        most_rows: int,
        kept: Kept,
        tokens: torch.Tensor | None,
    ) -> None:
        self.model, self.cells, self.reduce, self.kept = model, cells, reduce, kept
        few = tokens is not None and model.vocab_size and 0 < len(tokens) <= model.vocab_size // FEW
        self.tokens = tokens if few else None
        fitting = READOUT_NUMBERS // (model.vocab_size or 1 << 16)
        self.most = max(16, min(fitting, READOUT_BATCHES * most_rows))
        self.held: list[tuple[list[int], torch.Tensor]] = []  # indices of cells and their last hidden states

    def hold(self, cells: list[int], hidden: torch.Tensor) -> None:
        """Hold back the hidden states of some cells, `[cells, hidden]`; read all out if there are many."""
        self.held.append((cells, hidden))
        if sum(len(own) for own, _ in self.held) >= self.most:
            self.read_out()

    def read_out(self) -> None:
        """Project all hidden states held back, and keep what `reduce` makes of their logits."""
        if not self.held:
            return
        cells = [i for own, _ in self.held for i in own]
        hidden = torch.cat([states.to(self.held[-1][1].device) for _, states in self.held])
        self.held = []
        start = 0
        while start < len(cells):
            some = slice(start, start + self.most)
            if not within_memory(partial(self._project, cells[some], hidden[some]), len(cells[some])):
                self.most = max(1, len(cells[some]) // 2)
                continue
            start += len(cells[some])

    def _project(self, cells: list[int], hidden: torch.Tensor) -> None:
        self.keep(cells, self.reduce(self._logits(hidden), cells))

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits, float32 `[cells, vocab]`; NaN for tokens that nobody reads."""
        if self.tokens is None:
            return self.model.project_on_vocab(hidden).float()
        read = self.model.project_on_vocab(hidden, self.tokens).float()
        logits = read.new_full((len(hidden), self.model.vocab_size), torch.nan)
        logits[:, self.tokens.to(read.device)] = read
        return logits

    def keep(self, cells: list[int], made: dict[str, torch.Tensor]) -> None:
        """Put what `reduce` made of some cells' logits into the results."""
        self.kept.put(cells, self.cells, made)

    def rescue(self) -> None:
        """After an error: keep what is held, and read it out if that is still possible."""
        with contextlib.suppress(Exception):
            self.kept.held = {i: row.cpu() for own, rows in self.held for i, row in zip(own, rows, strict=True)}
            self.read_out()
