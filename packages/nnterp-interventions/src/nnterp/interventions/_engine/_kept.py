"""What a sweep has finished: kept by the caller, so that it outlives an error in the middle."""

from __future__ import annotations

import torch


class Kept:
    """Results of cells, filled in while a sweep runs.

    Attributes:
        results: `[cells, ...]` for each name that `reduce` returns, on the CPU; NaN, or −1, where a cell is not done.
        done: Indices of the cells whose results are there. A sweep does not run batches that are done.
        held: Cell → its last hidden state, `[hidden]`, if the sweep was cut short before it was to be read out. It was
            read out then, with fewer others; a sweep that goes on reads it out again with those it would have had, so
            that no bit of the results depends on the interruption.
    """

    def __init__(
        self,
        results: dict[str, torch.Tensor] | None = None,
        done: set[int] | None = None,
        held: dict[int, torch.Tensor] | None = None,
    ) -> None:
        self.results: dict[str, torch.Tensor] = {} if results is None else results
        self.done: set[int] = set() if done is None else done
        self.held: dict[int, torch.Tensor] = {} if held is None else held

    def put(self, cells: list[int], count: int, made: dict[str, torch.Tensor]) -> None:
        """Write what `reduce` made of some of `count` cells."""
        for name, tensor in made.items():
            if name not in self.results:
                gap = float("nan") if tensor.is_floating_point() else -1
                self.results[name] = torch.full((count, *tensor.shape[1:]), gap, dtype=tensor.dtype)
            self.results[name][cells] = tensor.cpu()
        self.done.update(cells)
