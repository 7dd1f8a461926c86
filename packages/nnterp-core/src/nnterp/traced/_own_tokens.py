"""Where a row's own tokens stand in the running forward pass, whatever is padded and however much a cache leaves out.

Positions count over a row's own tokens: its prompt's, and in a generation those that were generated so far.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from nnterp.errors import ShapeError
from nnterp.selectors import Selector

if TYPE_CHECKING:
    from nnterp.traced._running import Running


class Given:
    """The rows that a run was given: token ids and mask, `[rows, seq]`; what is None was not given."""

    def __init__(self, ids: torch.Tensor | None, mask: torch.Tensor | None, width: int | None) -> None:
        self.ids, self.mask, self.width = ids, mask, width
        self.texts: dict[int, tuple[str, list[tuple[int, int]]]] = {}
        self.tokens: list[list[int]] | None = None  # read off the mask once: it may be on a GPU

    def columns(self, row: int, width: int) -> list[int]:
        """The columns of a row's own tokens."""
        if self.mask is None:
            return list(range(width))
        if self.tokens is None:
            self.tokens = [[i for i, own in enumerate(line) if own] for line in self.mask.tolist()]
        return self.tokens[row]


# rows: prompts of this worker; each stands in `copies` rows of the stream (beams, several returned sequences).
# begin: the first column that this pass runs; earlier ones are in the cache. total: columns so far.
class Pass:
    """The rows of one worker in one forward pass, and what each column of its stream holds."""

    def __init__(self, model: Running, stream: torch.Tensor, step: int, group: list | None, what: str) -> None:
        self.model, self.step, self.what = model, step, what
        self.given: Given = model.interleaver.given
        batcher = model.interleaver.batcher
        if batcher is not None and batcher.batching and group is not None:
            self.first, rows = group
        else:
            known = self.given.mask if self.given.mask is not None else self.given.ids
            self.first, rows = 0, stream.shape[0] if known is None else known.shape[0]
        if stream.shape[0] % rows:
            raise ShapeError(f"{what}: the stream has {stream.shape[0]} rows for {rows} prompts.")
        self.rows, self.copies = rows, stream.shape[0] // rows
        width = stream.shape[1] if self.given.width is None else self.given.width
        self.prompt = width
        self.total = width + step
        if stream.shape[1] not in (1, self.total):
            raise ShapeError(
                f"{what}: pass {step} of this run has {stream.shape[1]} positions; {self.total} were expected, or 1 "
                "with a cache, so it is not known where a row's own tokens stand. Leave token_positions out."
            )
        self.begin = self.total - stream.shape[1]

    def own(self, row: int) -> list[int]:
        """The columns of a row's own tokens so far."""
        return [*self.given.columns(self.first + row, self.prompt), *range(self.prompt, self.total)]

    def text(self, row: int) -> tuple[str, list[tuple[int, int]]]:
        """The text of a row's prompt, and where each of its own tokens stands in it."""
        known = self.given.texts
        if self.first + row not in known:
            known[self.first + row] = spelled(self.model.tokenizer, self.ids(row))
        return known[self.first + row]

    def ids(self, row: int) -> tuple[int, ...]:
        """The token ids of a row's prompt."""
        if self.given.ids is None:
            raise ValueError(f"{self.what}: the prompt's text needs token ids, and the model was given none.")
        index = self.first + row
        return tuple(self.given.ids[index][self.given.columns(index, self.prompt)].tolist())

    def find(self, row: int, positions: Any, required: bool) -> list[int]:
        """The columns of this pass at a row's positions; -1 for one that an earlier pass ran, unless `required`."""
        own, found = self.own(row), []
        for position in positions:
            if isinstance(position, slice):
                found += [column - self.begin for column in own[position] if column >= self.begin]
                continue
            for index in position.among(self, row) if isinstance(position, Selector) else (position,):
                if not -len(own) <= index < len(own):
                    tokens = f"{len(own)} tokens" + (f" at step {self.step}" if self.step else "")
                    raise IndexError(f"{self.what}: row {row} has {tokens}, so there is no position {index}.")
                if own[index] < self.begin and required:
                    raise IndexError(
                        f"{self.what}: position {index} of row {row} is not in this forward pass. With a cache, step "
                        f"{self.step} runs one token, position {len(own) - 1}. Choose steps='prompt' for the prompt's "
                        "tokens, token_positions=-1 for the newest, or a slice."
                    )
                found.append(max(own[index] - self.begin, -1))
        return found


def spelled(tokenizer: Any, ids: tuple[int, ...]) -> tuple[str, list[tuple[int, int]]]:
    """The text of token ids, and the begin and end of each token in it; special tokens are empty."""
    special = set(tokenizer.all_special_ids)
    text, kept, spans = "", [], []
    for token in ids:
        before = text
        if token not in special:
            kept.append(token)
            text = tokenizer.decode(kept, clean_up_tokenization_spaces=False)
        spans.append((shared_length(before, text), len(text)))  # half a letter is spelled anew
    return text, spans


def shared_length(one: str, other: str) -> int:
    """How many characters two texts begin with in common."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
