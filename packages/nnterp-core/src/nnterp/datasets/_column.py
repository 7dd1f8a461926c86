"""The stored rows of one value: each by its number, by prompt and token, shuffled, or all."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy
import torch

from nnterp.datasets._format import label
from nnterp.datasets._shard import Shard
from nnterp.datasets._shuffled import STRETCH, ShuffledRows
from nnterp.datasets._stored import Stored, place
from nnterp.indices import axes_of_array, integer, read_indices, within


class Where(NamedTuple):
    """What a stored row belongs to.

    Attributes:
        prompt: The number of the prompt.
        position: The position among the prompt's own tokens.
        token_id: The token that stands there.
    """

    prompt: int
    position: int
    token_id: int


class ActivationColumn(torch.utils.data.Dataset):
    """The rows of one value of an `ActivationDataset`, at one layer or at all that are stored.

    A row is what is stored of one position, or, where one position of each prompt was collected, of one prompt. It is a
    map-style `torch.utils.data.Dataset`: `column[k]` is row `k`, `[...]` for one layer and `[layers, ...]` for all;
    `column[[4, 0]]` and `column[10:20]` are several, `[rows, ...]`. A row of an attention pattern is the pattern of a
    prompt, `[heads, (positions,) keys]`.

    Attributes:
        name: The value.
        layers: The layers, none for a value that is not per layer.
        rows: How many rows there are.
    """

    def __init__(self, stored: Stored, name: str, layers: tuple[int, ...], stacked: bool) -> None:
        self._stored, self.name, self.layers = stored, name, layers
        self.labels = [label(name, layer) for layer in layers] or [name]
        self.stacked = stacked and bool(layers)
        self.per: str = stored.manifest["values"][name]["stored_per"]
        self.single: bool = stored.manifest["one_position"]
        self.ends = stored.ends_of(self.per)
        self.rows = self.ends[-1]
        about = [stored.tensors[own] for own in self.labels if own in stored.tensors]
        if len({str(one) for one in about}) > 1:
            raise ValueError(
                f"The layers of {name} differ in shape ({', '.join(str(one['shape']) for one in about)}), so they make "
                f"no one tensor; ask for one: dataset[{name!r}, {layers[0]}]."
            )

    def __len__(self) -> int:
        """Number of rows."""
        return self.rows

    def __getitem__(self, rows: Any) -> torch.Tensor:
        """One row, or several stacked; see the class.

        Raises:
            IndexError: There is no such row.
            TypeError: It is no index.
            ValueError: Several patterns of different shapes were asked for.
        """
        if axes_of_array(rows) in (None, 0) and hasattr(rows, "__index__"):
            number, inside = place(self.ends, self._row(rows))
            return self._read(self._stored.shard(number), inside, inside + 1)[0]
        if isinstance(rows, slice) and rows.step in (None, 1):
            start, stop, _ = rows.indices(self.rows)
            return self._span(start, stop)
        return self._several(read_indices(rows, self.rows, "The rows", "rows"))

    def __getitems__(self, rows: list[int]) -> list[torch.Tensor]:
        """Several rows, shard by shard; torch's DataLoader asks so."""
        return list(self._several(rows)) if self.per != "pattern" else [self[row] for row in rows]

    def __iter__(self) -> Iterator[torch.Tensor]:
        """All rows, in order."""
        at_once = 1 if self.per == "pattern" else STRETCH
        for number in range(len(self.ends) - 1):
            size = self.ends[number + 1] - self.ends[number]
            for start in range(0, size, at_once):
                yield from self.read(number, start, min(start + at_once, size))

    def prompt(self, prompt: int, token: int | None = None) -> torch.Tensor:
        """What is stored of one prompt.

        Args:
            prompt: Its number in the dataset, negative from the end.
            token: A position among its own tokens, negative from its last; None for all that are stored.

        Returns:
            `[(layers,) positions, ...]`; without the axis of positions if one was collected of each prompt, or `token`
            is given.

        Raises:
            IndexError: There is no such prompt, or this position of it is not stored.
        """
        number, inside = self._stored.prompt(prompt)
        shard = self._stored.shard(number)
        at = None if token is None else self._among(shard, inside, prompt, token)
        if self.per != "position":
            found = self._read(shard, inside, inside + 1)[0]
            if at is None or self.per == "prompt" or self.single:
                return found
            return found.select(-2, at).clone()
        start, end = (int(shard.position_starts[inside + more]) for more in (0, 1))
        found = self._read(shard, start, end) if at is None else self._read(shard, start + at, start + at + 1)
        found = found.transpose(0, 1) if self.stacked else found
        return found if at is None else found.select(1 if self.stacked else 0, 0)

    def where(self, row: int) -> Where:
        """Which prompt, position and token a row belongs to.

        Raises:
            IndexError: There is no such row.
            ValueError: Rows are attention patterns of all positions of a prompt, so they belong to no one token.
        """
        if self.per == "pattern" and not self.single:
            raise ValueError(f"A row of {self.name} is the pattern of a prompt: row {row} is that of prompt {row}.")
        number, inside = place(self.ends, self._row(row))
        shard, first = self._stored.shard(number), self._stored.entries[number]["first"]
        if self.per == "position":
            mine = int(numpy.searchsorted(shard.position_starts, inside, side="right")) - 1
            position = int(shard.positions(mine)[inside - int(shard.position_starts[mine])])
        else:
            mine = inside
            at_end = self.name == "next_token_probs" or not self.single
            position = len(shard.token_ids(mine)) - 1 if at_end else int(shard.positions(mine)[0])
        return Where(first + mine, position, int(shard.token_ids(mine)[position]))

    def tensor(self) -> torch.Tensor:
        """All rows, loaded into memory: `[rows, ...]`, or `[layers, rows, ...]`, as `collect` without `to=` gives them.

        Raises:
            ValueError: They are attention patterns of different shapes.
        """
        found = self._span(0, self.rows)
        return found.transpose(0, 1).contiguous() if self.stacked else found

    def shuffled(self, buffer: int = 65536, seed: int = 0) -> ShuffledRows:
        """A stream of all rows in random order, for data larger than memory; see `ShuffledRows`.

        Raises:
            ValueError: `buffer` is not positive; or rows are attention patterns, which differ in shape.
        """
        if self.per == "pattern":
            raise ValueError(f"Rows of {self.name} differ in shape. Read them prompt by prompt.")
        return ShuffledRows(self, buffer, seed)

    def __repr__(self) -> str:
        of = f"[{', '.join(map(str, self.layers))}]" if self.layers else ""
        about = self._stored.tensors.get(self.labels[0], {})
        return f"ActivationColumn({self.name}{of}: {self.rows} rows of {about.get('shape')}, {about.get('dtype')})"

    def read(self, number: int, start: int, end: int) -> torch.Tensor:
        """Rows of one shard that stand next to each other, `[rows, (layers,) ...]`."""
        return self._read(self._stored.shard(number), start, end)

    # -- reading -------------------------------------------------------------------------------------------------------

    def _read(self, shard: Shard, start: int, end: int) -> torch.Tensor:
        """Rows of one shard next to each other, `[rows, (layers,) ...]`, a copy."""
        if self.per == "pattern":
            heads = self._stored.tensors[self.labels[0]]["shape"][0]
            each = [
                torch.stack([shard.pattern(name, prompt, heads, self.single) for prompt in _alike(shard, start, end)])
                for name in self.labels
            ]
        else:
            each = [shard.tensor(name)[start:end] for name in self.labels]
        return torch.stack(each, dim=1) if self.stacked else each[0].clone()

    def _span(self, start: int, stop: int) -> torch.Tensor:
        pieces = []
        for number in range(len(self.ends) - 1):
            begin, end = max(start, self.ends[number]), min(stop, self.ends[number + 1])
            if begin < end:
                shard = self._stored.shard(number)
                pieces.append(self._read(shard, begin - self.ends[number], end - self.ends[number]))
        if not pieces:
            raise IndexError(f"Rows {start} to {stop} of {self.rows} are none.")
        return _joined(pieces, self.name)

    def _several(self, rows: list[int]) -> torch.Tensor:
        places = [place(self.ends, row) for row in rows]
        found: list[Any] = [None] * len(rows)
        for k in sorted(range(len(rows)), key=lambda k: places[k]):
            number, inside = places[k]
            found[k] = self._read(self._stored.shard(number), inside, inside + 1)
        return _joined(found, self.name)

    def _row(self, row: Any) -> int:
        return within(integer(row, "A row"), self.rows, f"The column of {self.name}", "rows")

    def _among(self, shard: Shard, inside: int, prompt: int, token: int) -> int:
        """Where a token's row stands among those of its prompt."""
        length = len(shard.token_ids(inside))
        token = within(integer(token, "A token"), length, f"Prompt {prompt}", "tokens")
        have = shard.positions(inside).tolist() if self.name != "next_token_probs" else [length - 1]
        if token not in have:
            raise IndexError(f"Position {token} of prompt {prompt} is not stored; these are: {have[:20]}.")
        return have.index(token)


def _alike(shard: Shard, start: int, end: int) -> range:
    """Prompts of one shard whose patterns have one shape.

    Raises:
        ValueError: They do not.
    """
    queries, keys = (numpy.diff(starts[start : end + 1]) for starts in (shard.position_starts, shard.token_starts))
    if len(set(zip(queries.tolist(), keys.tolist(), strict=True))) > 1:
        raise ValueError("Attention patterns of prompts of different lengths make no one tensor; read them one by one.")
    return range(start, end)


def _joined(pieces: list[torch.Tensor], name: str) -> torch.Tensor:
    if len({piece.shape[1:] for piece in pieces}) > 1:
        raise ValueError(f"Rows of {name} differ in shape, so they make no one tensor; read them one by one.")
    return torch.cat(pieces) if len(pieces) > 1 else pieces[0]
