"""Prompts as the model reads them: rows of token ids, and batches of rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class EncoderDecoderPrompt:
    """A prompt of an encoder-decoder model.

    Attributes:
        encoder: What the encoder reads: a text, token ids, or, for a model that listens, its features `[bins, frames]`
            as the processor makes them.
        decoder: What the decoder continues: a text, which follows the decoder's start token; token ids, which are taken
            as they are; "" for the start token alone.

    Example:
        >>> model.collect(EncoderDecoderPrompt("translate English to German: The house", "Das"), "layers_output")
    """

    encoder: str | Sequence[int] | torch.Tensor
    decoder: str | Sequence[int] | torch.Tensor = ""


@dataclass(frozen=True)
class Row:
    """One prompt as the model reads it.

    Attributes:
        ids: Its token ids, special tokens included, padding excluded.
        text: Its text, None for a prompt that was given as token ids.
        offsets: For each token the span of `text` it stands for, None where the tokenizer cannot tell.
        encoder: In an encoder-decoder model, what the encoder reads; `ids` are then the decoder's.
        features: Of what a listening encoder reads, the features `[bins, frames]`; its `ids` only count its positions.
    """

    ids: tuple[int, ...]
    text: str | None = None
    offsets: tuple[tuple[int, int], ...] | None = None
    encoder: Row | None = None
    features: torch.Tensor | None = field(default=None, compare=False)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def identity(self) -> Any:
        """What distinguishes it from other prompts: its ids, and what the encoder reads."""
        if self.features is not None:
            return self.features.flatten().tolist()
        return self.ids if self.encoder is None else (self.ids, self.encoder.identity)

    @property
    def lengths(self) -> tuple[int, int]:
        """Its tokens, and those that the encoder reads."""
        return len(self.ids), 0 if self.encoder is None else len(self.encoder)


@dataclass(frozen=True)
class Batch:
    """Rows of similar length, padded on the tokenizer's side; those of an encoder-decoder model on the right.

    Attributes:
        indices: For each row, its place among the prompts that were given.
        rows: The rows.
        input_ids: `[batch, seq]`, int64, on the CPU.
        attention_mask: `[batch, seq]`, 1 at tokens and 0 at padding.
        starts: For each row, where its first token stands, after padding on the left.
        encoder: In an encoder-decoder model, what the encoder reads, as a batch of its own.
    """

    indices: tuple[int, ...]
    rows: tuple[Row, ...]
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    starts: tuple[int, ...]
    encoder: Batch | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def encoding(self) -> dict[str, torch.Tensor]:
        """What to trace: `model.trace(batch.encoding)`."""
        if self.encoder is None:
            return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        own = {"decoder_input_ids": self.input_ids, "decoder_attention_mask": self.attention_mask}
        features = [row.features for row in self.encoder.rows if row.features is not None]
        heard = {"input_features": torch.stack(features)} if features else self.encoder.encoding
        return {**heard, **own}

    @property
    def last(self) -> torch.Tensor:
        """For each row, where its last token stands, `[batch]`."""
        last = [start + len(row) - 1 for start, row in zip(self.starts, self.rows, strict=True)]
        return torch.tensor(last, device="cpu")


def given(rows: Sequence[Row], ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a model is given for rows of equal lengths whose token ids stand in `ids`, `[rows, seq]`."""
    encoders = [row.encoder for row in rows if row.encoder is not None]
    if not encoders:
        return {"input_ids": ids}
    features = [row.features for row in encoders if row.features is not None]
    if features:
        return {"input_features": torch.stack(features), "decoder_input_ids": ids}
    return {"input_ids": torch.tensor([row.ids for row in encoders], device="cpu"), "decoder_input_ids": ids}
