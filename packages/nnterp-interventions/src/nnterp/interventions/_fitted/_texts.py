"""Texts that a lens is fitted on and measured on: rows, which positions count, and what is held out."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from nnterp.arguments import count
from nnterp.identity import digest
from nnterp.indices import Indices, integer
from nnterp.inputs import Row, encode
from nnterp.interventions._layers import layers_of

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer

SKIP_FIRST = 16  # Gurnee et al., 2026: the first positions are attention sinks


def rows_of(
    model: StandardizedTransformer, texts: Any, max_length: int | None, skip_first: int, what: str
) -> list[Row]:
    """Texts as rows of at most `max_length` tokens; positions from `skip_first` to the last but one count.

    Raises:
        ValueError: A text is too short to have such a position.
    """
    skip_first, limit = read_limits(skip_first, max_length)
    listed = [texts] if isinstance(texts, str) else texts
    if limit is not None and isinstance(listed, Sequence):
        listed = [_cut(model, text, limit) for text in listed]
    rows = [row if limit is None or len(row) <= limit else Row(row.ids[:limit]) for row in encode(model, listed)]
    short = [i for i, row in enumerate(rows) if len(row) < skip_first + 2]
    if short:
        lengths = ", ".join(str(len(rows[i])) for i in short[:5])
        raise ValueError(
            f"{what}: {len(short)} of {len(rows)} texts have fewer than {skip_first + 2} tokens (text {short[0]} and "
            f"others: {lengths}), so none of their positions counts with skip_first={skip_first}. Leave them out, join "
            "texts, or give a smaller skip_first."
        )
    return rows


def read_limits(skip_first: Any, max_length: Any) -> tuple[int, int | None]:
    """`skip_first` and `max_length` as plain integers.

    Raises:
        TypeError, ValueError: They are none, or leave no position.
    """
    first = count(skip_first, "skip_first", 0)
    return first, None if max_length is None else count(max_length, "max_length", first + 2)


def _cut(model: StandardizedTransformer, text: Any, limit: int) -> Any:
    """The first tokens of a text, or of a row of ids: what is longer than the model's context is of use as well."""
    if isinstance(text, str):
        return model.tokenizer(text)["input_ids"][:limit] if len(text) > limit else text
    plain = isinstance(text, (list, tuple)) and all(isinstance(i, int) for i in text)
    return text[:limit] if plain or (isinstance(text, torch.Tensor) and text.dim() == 1) else text


def digests_of(rows: Sequence[Row]) -> list[str]:
    """A short digest of each row, by which a text that was fitted on is known again."""
    return sorted({digest(tuple(row.ids)) for row in rows})


def split(
    rows: Sequence[Row], held_out: Any, seed: int, model: Any, settings: tuple[int | None, int]
) -> tuple[list[Row], list[Row]]:
    """Rows to fit on, and rows held out: a share of them, drawn by `seed`, or texts of their own.

    Args:
        rows: The rows.
        held_out: A share from 0 to below 1, or texts.
        seed: Of the draw.
        model, settings: What `rows_of` needs for texts.

    Raises:
        ValueError: The share leaves nothing to fit on, or a text is on both sides.
        TypeError: The seed is no integer.
    """
    seed = integer(seed, "seed")
    if held_out is None or isinstance(held_out, bool):
        raise ValueError(f"held_out={held_out!r}; give a share from 0 to below 1, or texts.")
    if isinstance(held_out, (int, float)):
        if not 0 <= held_out < 1:
            raise ValueError(f"held_out={held_out!r}; give a share from 0 to below 1, or texts.")
        distinct = list(dict.fromkeys(row.ids for row in rows))  # a text that occurs twice is on one side
        number = 0 if held_out == 0 else max(1, round(held_out * len(distinct)))
        if number >= len(distinct):
            raise ValueError(
                f"held_out={held_out} of {len(distinct)} different texts leaves none to fit on: give more texts, or "
                "held_out=0."
            )
        chosen = set(random.Random(seed).sample(distinct, number))
        kept = [row for row in rows if row.ids not in chosen]
        return kept, [Row(ids) for ids in distinct if ids in chosen]
    max_length, skip_first = settings
    apart = rows_of(model, held_out, max_length, skip_first, "held_out")
    fitted = {row.ids for row in rows}
    if both := [i for i, row in enumerate(apart) if row.ids in fitted]:
        raise ValueError(
            f"held_out: text {both[0]} is among the texts to fit on ({len(both)} in all), as far as "
            f"max_length={max_length} tokens go. Hold out other texts, or give a share."
        )
    return list(rows), apart


def sources_of(model: StandardizedTransformer, layers: Indices, to_layer: int | None = None) -> list[int]:
    """The layers to fit a lens at, in order; all before `to_layer` if None, which is the last if it is None.

    Raises:
        ValueError: One of them is not before `to_layer`, or there is none.
    """
    last = model.num_layers - 1
    target = last if to_layer is None else to_layer
    chosen = [i for i in range(target) if layers is None] or sorted(set(layers_of(model, layers)))
    if any(layer >= target for layer in chosen):
        before = "the last" if target == last else f"layer {target}"
        raise ValueError(f"A lens is fitted at layers before {before}, from 0 to {target - 1}, not at {chosen}.")
    return chosen
