"""Rows in batches: which may share one, and how they are padded."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import is_fake

from nnterp.arguments import count
from nnterp.huggingface import is_encoder_decoder, uncached
from nnterp.inputs._rows import Batch, Reader, Row


def forward_flags(model: Reader) -> dict[str, Any]:
    """Keywords for a forward pass that nothing will continue: `use_cache=False`, for models that take it."""
    return uncached(model._module)


def require_tokens(given: Mapping[str, Any]) -> None:
    """Raise if a row of what a run is given has no tokens: no model computes anything of it.

    Args:
        given: What the model's forward gets by name.

    Raises:
        ValueError: There is such a row.
    """
    ids, mask = given.get("input_ids"), given.get("attention_mask")
    if given.get("inputs_embeds") is None and isinstance(ids, torch.Tensor) and ids.dim() == 2 and not ids.shape[1]:
        raise ValueError("The prompt has no tokens, and a model needs at least one: give a text that is not empty.")
    if isinstance(mask, torch.Tensor) and mask.dim() == 2 and not is_fake(mask):
        empty = (mask == 0).all(1).nonzero().flatten().tolist()
        if empty:
            raise ValueError(f"Prompt {empty[0]} of {len(mask)} has no tokens, and a model needs at least one.")


@contextlib.contextmanager
def left_padded(tokenizer: Any) -> Iterator[None]:
    """The tokenizer's padding side set to the left inside the block: the side that the certificate proves exact."""
    side = getattr(tokenizer, "padding_side", None)
    if side is None:
        yield
        return
    tokenizer.padding_side = "left"
    try:
        yield
    finally:
        tokenizer.padding_side = side


def by_length(rows: Sequence[Row]) -> list[int]:
    """Indices of the rows, longest first, in the order given where lengths are equal."""
    return sorted(range(len(rows)), key=lambda i: (*(-length for length in rows[i].lengths), i))


def sharing_side(model: Reader, row: Row, growth: int = 0) -> tuple[int, ...]:
    """What rows that may share a batch agree in, in an encoder-decoder model for both of its inputs."""
    own, heard = row.lengths
    side = model.sharing.side(own, growth)
    return side if row.encoder is None else (*side, *model.sharing.side(heard))


def sharing_first(model: Reader, rows: Sequence[Row], order: Sequence[int], growth: int = 0) -> list[int]:
    """Of indices of rows in the order of `by_length`, the first ones whose rows may share a batch with the very first.

    Args:
        model: The model, whose `sharing` says which rows may.
        rows: The rows. One with an image shares with none.
        order: Indices of some of them.
        growth: How many tokens each row will grow by in a generation.
    """
    if rows[order[0]].images is not None:
        return [order[0]]
    sides = (None if rows[i].images else sharing_side(model, rows[i], growth) for i in order)
    first = next(sides)
    return list(order[: 1 + sum(1 for _ in itertools.takewhile(lambda side: side == first, sides))])


def batches(model: Reader, rows: Sequence[Row], batch_size: int, growth: int = 0) -> Iterator[Batch]:
    """The rows in batches of at most `batch_size`, longest first, rows of like length together.

    A batch holds only rows that give in it what each gives alone (`model.sharing`): rows of equal length where
    HuggingFace's own forward is not exact under padding, and otherwise rows between the same thresholds.

    Args:
        model: The model.
        rows: The rows.
        batch_size: Most rows of a batch.
        growth: How many tokens will be generated after each row.

    Raises:
        ValueError: `batch_size` is not positive.
        TypeError: It is no integer.
    """
    batch_size = count(batch_size, "batch_size")
    order = by_length(rows)
    while order:
        chosen = sharing_first(model, rows, order[:batch_size], growth)
        yield pad(model, [rows[i] for i in chosen], tuple(chosen))
        order = order[len(chosen) :]


def pad(model: Reader, rows: Sequence[Row], indices: tuple[int, ...] | None = None) -> Batch:
    """One batch of these rows, in this order."""
    width = max(len(row) for row in rows)
    left = getattr(model.tokenizer, "padding_side", "left") == "left" and not is_encoder_decoder(model._module)
    filler = getattr(model.tokenizer, "pad_token_id", None) or 0
    ids = torch.full((len(rows), width), filler, dtype=torch.long, device="cpu")
    mask = torch.zeros_like(ids)
    starts = []
    for i, row in enumerate(rows):
        start = width - len(row) if left else 0
        ids[i, start : start + len(row)] = torch.tensor(row.ids, device="cpu")
        mask[i, start : start + len(row)] = 1
        starts.append(start)
    indices = tuple(range(len(rows))) if indices is None else indices
    heard = [row.encoder for row in rows if row.encoder is not None]
    if heard and len(heard) < len(rows):
        raise ValueError(f"{len(heard)} of {len(rows)} rows of a batch have an input for the encoder: all need one.")
    encoder = pad(model, heard, indices) if heard else None
    return Batch(indices, tuple(rows), ids, mask, tuple(starts), encoder)
