"""Rows in random order, read shard by shard through a buffer, so that the disk is read in long stretches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch

from nnterp.arguments import count

STRETCH = 1024  # rows that are read at a time


class Rows(Protocol):
    """Rows that lie in shards."""

    ends: list[int]

    def __len__(self) -> int: ...

    def read(self, number: int, start: int, end: int) -> torch.Tensor:
        """Rows of one shard that stand next to each other, `[rows, ...]`."""
        ...


class ShuffledRows(torch.utils.data.IterableDataset):
    """A stream of all rows of a column, each once: shards in random order, and rows mixed within a buffer.

    A row changes places only with rows that are in the buffer at the same time. With a buffer as large as the column
    the order is uniformly random. It depends on the seed and on `epoch`, which each pass over the stream raises by
    one. Workers of a `DataLoader` share the shards, so more workers than shards are idle; with `num_workers`, call
    `set_epoch` before each pass, as with torch's samplers.

    Attributes:
        epoch: The number of the next pass.
    """

    def __init__(self, column: Rows, buffer: int, seed: int) -> None:
        self.column, self.buffer, self.seed = column, count(buffer, "buffer"), count(seed, "seed", least=0)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the number of the next pass."""
        self.epoch = count(epoch, "epoch", least=0)

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.column)

    def __iter__(self) -> Iterator[torch.Tensor]:
        """The rows, `[(layers,) ...]` each."""
        generator = torch.Generator("cpu").manual_seed((self.seed << 20) + self.epoch)
        self.epoch += 1
        column = self.column
        order = torch.randperm(len(column.ends) - 1, generator=generator, device="cpu").tolist()
        worker = torch.utils.data.get_worker_info()
        if worker is not None:
            order = order[worker.id :: worker.num_workers]
        held: torch.Tensor | None = None  # [buffer, ...]
        filled = 0
        for number in order:
            size = column.ends[number + 1] - column.ends[number]
            for start in range(0, size, STRETCH):
                rows = column.read(number, start, min(start + STRETCH, size))
                if held is None:
                    held = rows.new_empty(min(self.buffer, len(column)), *rows.shape[1:])
                room = min(len(held) - filled, len(rows))
                held[filled : filled + room] = rows[:room]
                filled += room
                left = rows[room:]
                for k, slot in enumerate(
                    torch.randint(len(held), (len(left),), generator=generator, device="cpu").tolist()
                ):
                    yield held[slot].clone()
                    held[slot] = left[k]
        if held is not None:
            for slot in torch.randperm(filled, generator=generator, device="cpu").tolist():
                yield held[slot].clone()
