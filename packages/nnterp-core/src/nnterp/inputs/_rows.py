"""What a prompt is once it is read: a row of token ids, and rows in a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from nnterp.images import Images
from nnterp.traced import Readout, Sharing


class Reader(Protocol):
    """What reading prompts needs of a model."""

    tokenizer: Any
    _module: nn.Module

    @property
    def model_class(self) -> str:
        """Name of the HuggingFace class."""
        ...

    @property
    def sharing(self) -> Sharing:
        """Which rows may share a padded batch, by their lengths."""
        ...

    @property
    def only_with_image(self) -> tuple[int, ...]:
        """Indices of the layers that run only with an image."""
        ...

    @property
    def readout(self) -> Readout:
        """How hidden states become logits; holds the stream's layout."""
        ...

    def require_images(self, row: Row) -> None:
        """Raise unless a prompt with an image runs as is proven; prove it with this prompt if nothing has yet."""
        ...


@dataclass(frozen=True)
class Row:
    """One prompt as the model reads it.

    Attributes:
        ids: Its token ids, special tokens included, padding excluded.
        text: Its text, None for a prompt that was given as token ids.
        offsets: For each token the span of `text` it stands for, None where the tokenizer cannot tell.
        images: The images of the prompt; None for a text.
    """

    ids: tuple[int, ...]
    text: str | None = None
    offsets: tuple[tuple[int, int], ...] | None = None
    images: Images | None = None

    @property
    def identity(self) -> tuple[int | str, ...]:
        """What tells the prompt from others: its ids, and the digest of its images."""
        return self.ids if self.images is None else (*self.ids, self.images.digest)

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Batch:
    """Rows of similar length, padded on the tokenizer's side.

    Attributes:
        indices: For each row, its place among the prompts that were given.
        rows: The rows.
        input_ids: `[batch, seq]`, int64, on the CPU.
        attention_mask: `[batch, seq]`, 1 at tokens and 0 at padding.
        starts: For each row, where its first token stands, after padding on the left.
    """

    indices: tuple[int, ...]
    rows: tuple[Row, ...]
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    starts: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def encoding(self) -> dict[str, torch.Tensor]:
        """What to trace: `model.trace(batch.encoding)`."""
        images = self.rows[0].images
        beside = {} if images is None else images.repeated(len(self.rows))
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask, **beside}

    @property
    def last(self) -> torch.Tensor:
        """For each row, where its last token stands, `[batch]`."""
        last = [start + len(row) - 1 for start, row in zip(self.starts, self.rows, strict=True)]
        return torch.tensor(last, device="cpu")
