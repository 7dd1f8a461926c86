"""A finished shard, mapped into memory: what is read of it is loaded from the disk, the rest is not."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy
import torch

from nnterp.datasets._format import DTYPES, PROMPTS


class Shard:
    """The tensors of one file. They share the file's memory: copy what is handed out.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged; names it.
    """

    def __init__(self, path: Path, size: int) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"The shard {path} is gone. The same call of collect() writes it anew.")
        if path.stat().st_size != size:
            raise ValueError(damaged(path, f"it has {path.stat().st_size} bytes instead of {size}"))
        self.path = path
        self.bytes = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8, device="cpu")
        try:
            begin = 8 + int.from_bytes(self.bytes[:8].numpy().tobytes(), "little")
            self.header: dict[str, Any] = json.loads(self.bytes[8:begin].numpy().tobytes())
        except (ValueError, OverflowError) as error:
            raise ValueError(damaged(path, f"its header cannot be read ({error})")) from None
        self.begin = begin

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor in the file's memory."""
        entry = self.header[name]
        start, end = (self.begin + offset for offset in entry["data_offsets"])
        return self.bytes[start:end].view(DTYPES[entry["dtype"]]).view(entry["shape"])

    @cached_property
    def token_starts(self) -> numpy.ndarray[Any, Any]:
        """Where each prompt's tokens begin, and the end, `[prompts + 1]`."""
        return _starts(self.tensor(PROMPTS.tokens))

    @cached_property
    def position_starts(self) -> numpy.ndarray[Any, Any]:
        """Where each prompt's stored positions begin, and the end, `[prompts + 1]`."""
        return _starts(self.tensor(PROMPTS.counts))

    @cached_property
    def text_starts(self) -> numpy.ndarray[Any, Any]:
        """Where each prompt's text begins, and the end, `[prompts + 1]`."""
        return _starts(self.tensor(PROMPTS.text_bytes).clamp(min=0))

    @cached_property
    def pattern_starts(self) -> numpy.ndarray[Any, Any]:
        """Queries times keys of the prompts before each, `[prompts + 1]`."""
        return _starts(self.tensor(PROMPTS.counts) * self.tensor(PROMPTS.tokens))

    def token_ids(self, prompt: int) -> torch.Tensor:
        """The token ids of a prompt, `[tokens]`, int64, a copy."""
        return self.tensor(PROMPTS.token_ids)[self.token_starts[prompt] : self.token_starts[prompt + 1]].long()

    def positions(self, prompt: int) -> torch.Tensor:
        """The positions of a prompt that are stored, int64, a copy."""
        return self.tensor(PROMPTS.positions)[self.position_starts[prompt] : self.position_starts[prompt + 1]].long()

    def text(self, prompt: int) -> str | None:
        """The text of a prompt; None if it was given as token ids."""
        if self.tensor(PROMPTS.text_bytes)[prompt] < 0:
            return None
        span = self.tensor(PROMPTS.text)[self.text_starts[prompt] : self.text_starts[prompt + 1]]
        return span.numpy().tobytes().decode("utf-8", "surrogatepass")

    def pattern(self, name: str, prompt: int, heads: int, single: bool) -> torch.Tensor:
        """An attention pattern of one prompt, `[heads, (positions,) keys]`, in the file's memory."""
        keys = int(self.token_starts[prompt + 1] - self.token_starts[prompt])
        queries = int(self.position_starts[prompt + 1] - self.position_starts[prompt])
        start = int(self.pattern_starts[prompt]) * heads
        own = self.tensor(name)[start : start + heads * queries * keys]
        return own.view(heads, keys) if single else own.view(heads, queries, keys)


def damaged(path: Path, why: str) -> str:
    """What an error says of a damaged shard."""
    return (
        f"The shard {path} is damaged: {why}. Delete it, and the same call of collect() writes it anew; the other "
        f"shards stay."
    )


def _starts(counts: torch.Tensor) -> numpy.ndarray[Any, Any]:
    return numpy.concatenate([[0], numpy.cumsum(counts.numpy())])
