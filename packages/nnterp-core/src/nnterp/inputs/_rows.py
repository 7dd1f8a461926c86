"""What a prompt is once it is read: a row of token ids, and rows in a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from nnterp.beside import Beside, stacked
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
class EncoderDecoderPrompt:
    """A prompt of an encoder-decoder model.

    Attributes:
        encoder: What the encoder reads: a text, token ids, or, for a model that listens, its features `[bins, frames]`
            as the processor makes them.
        decoder: What the decoder continues: a text, which follows the decoder's start token; token ids, which are taken
            as they are; "" for the start token alone.

    Example:
        t5 = StandardizedTransformer(testing.tiny_encoder_decoder("t5"), tokenizer=testing.tiny_tokenizer())
        prompt = EncoderDecoderPrompt("translate English to German: The house", decoder=[2, 40])
        stream = t5.collect(prompt, "layers_output", positions=-1)["layers_output"]  # [layers, prompts, hidden]
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
        images: The images of the prompt; None for a text.
        encoder: In an encoder-decoder model, what the encoder reads; `ids` are then the decoder's.
        sounds: Of what a listening encoder reads, the features; its `ids` only count its positions.
    """

    ids: tuple[int, ...]
    text: str | None = None
    offsets: tuple[tuple[int, int], ...] | None = None
    images: Beside | None = None
    encoder: Row | None = None
    sounds: Beside | None = None

    @property
    def identity(self) -> tuple[int | str, ...]:
        """What tells the prompt from others: its ids, the digest of its images, and what the encoder reads."""
        beside = self.images or self.sounds
        own: tuple[int | str, ...] = self.ids if beside is None else (*self.ids, beside.digest)
        return own if self.encoder is None else (*own, "encoder", *self.encoder.identity)

    def words(self, tokenizer: Any) -> str:
        """Its text, or its decoded ids; behind what the encoder reads, if there is one."""
        own = self.text if self.text is not None else tokenizer.decode(list(self.ids))
        if self.encoder is None:
            return own
        return f"{'(sounds)' if self.encoder.sounds else self.encoder.words(tokenizer)} → {own}"

    @property
    def lengths(self) -> tuple[int, int]:
        """Its tokens, and those that the encoder reads."""
        return len(self.ids), 0 if self.encoder is None else len(self.encoder)

    def __len__(self) -> int:
        return len(self.ids)


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
            images = stacked([row.images for row in self.rows])
            return {"input_ids": self.input_ids, "attention_mask": self.attention_mask, **images}
        own = {"decoder_input_ids": self.input_ids, "decoder_attention_mask": self.attention_mask}
        return {**(stacked([row.sounds for row in self.encoder.rows]) or self.encoder.encoding), **own}

    @property
    def last(self) -> torch.Tensor:
        """For each row, where its last token stands, `[batch]`."""
        last = [start + len(row) - 1 for start, row in zip(self.starts, self.rows, strict=True)]
        return torch.tensor(last, device="cpu")


def given(rows: Sequence[Row], ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a model is given for rows of equal lengths whose token ids stand in `ids`, `[rows, seq]`."""
    encoders = [row.encoder for row in rows if row.encoder is not None]
    if not encoders:
        return {"input_ids": ids, **stacked([row.images for row in rows])}
    if len(encoders) < len(rows):
        raise ValueError(f"{len(encoders)} of {len(rows)} rows of a batch have an input for the encoder: all need one.")
    heard = stacked([encoder.sounds for encoder in encoders])
    if not heard:
        heard = {"input_ids": torch.tensor([encoder.ids for encoder in encoders], device="cpu")}
    return {**heard, "decoder_input_ids": ids}
