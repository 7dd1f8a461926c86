"""Positions in a prompt: counted over its own tokens, or found by a piece of its text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from typing import Any, TypeAlias

import torch

from nnterp.indices import axes_of_array, integers, shown_slice, within
from nnterp.inputs import Reader, Row
from nnterp.selectors import (
    ImageSelector,
    Selector,
    TextSelector,
    at,
    image,
    image_positions,
    image_token_ids,
    last_of,
    overlapping,
)

__all__ = [
    "ImageSelector",
    "Plain",
    "Positions",
    "Selector",
    "TextSelector",
    "at",
    "describe",
    "image",
    "is_one_position",
    "last_of",
    "per_prompt",
    "plain_positions",
    "resolve",
]


# Positions as functions take them: see `plain_positions`.
Positions: TypeAlias = "int | slice | Selector | Iterable[Any] | torch.Tensor | None"

# Positions in plain form: an index, a slice, a selector, several of these, or None for all.
Plain: TypeAlias = "int | slice | TextSelector | ImageSelector | tuple[Plain, ...] | None"


def plain_positions(given: Any, name: str = "positions") -> Plain:
    """Put positions as the user gives them in plain form, before a prompt is known.

    Read once, so a generator gives every prompt the same.

    Args:
        given: An index (also of NumPy, or a tensor without axes), a slice, a selector, a list, tuple, range, set,
            array, tensor or generator of these (also nested), or None or "all".
        name: How errors call the argument.

    Returns:
        An index, slice or selector as it is, a tuple for several, None for all positions.

    Raises:
        TypeError: It is something else: a boolean, a float.
        ValueError: It is empty, or a text.

    Example:
        print(positions.plain_positions([0, -1]))  # → (0, -1)
    """
    if isinstance(given, (TextSelector, ImageSelector)):
        return given
    if isinstance(given, str) and given != "all":
        raise ValueError(
            f'{name} are indices, selectors or "all", not the text {given!r:.80}. To find the tokens of a text in a '
            f"prompt, give nnterp.positions.at({given!r:.80}) or last_of({given!r:.80})."
        )
    items: Any = list(given) if (axes_of_array(given) or 0) > 1 else given
    several = isinstance(items, Iterable) and not isinstance(items, (str, bytes, bytearray, memoryview, Mapping, Set))
    if several and axes_of_array(items) is None:
        items = list(items)
        if any(isinstance(item, (Selector, slice, str)) or _is_list(item) for item in items):
            return tuple(plain_positions(item, name) for item in items)
    found = integers(items, name)
    return tuple(found) if isinstance(found, list) else found


def _is_list(item: Any) -> bool:
    """Whether an entry of a list is itself a list of positions."""
    return (axes_of_array(item) or 0) > 0 or isinstance(item, (list, tuple, range, Set))


def per_prompt(positions: Plain, prompts: int) -> list[Plain]:
    """Say which positions each prompt has.

    Returns:
        One entry for each prompt, the same for all, or, of a list that holds lists or slices, its own.

    Raises:
        ValueError: There is not one entry for each prompt.

    Example:
        print(positions.per_prompt(-1, 2))  # → [-1, -1]
    """
    if not isinstance(positions, tuple) or not any(isinstance(p, (tuple, slice)) for p in positions):
        return [positions] * prompts
    if len(positions) != prompts:
        raise ValueError(
            f"positions has {len(positions)} lists for {prompts} prompts; give one list per prompt, or one for all."
        )
    return list(positions)


def is_one_position(positions: Plain) -> bool:
    """Check whether positions are one index, or a selector of one token.

    Returns:
        True if they are; a result then has no axis for them.

    Example:
        print(positions.is_one_position(-1), positions.is_one_position((0, 1)))  # → True False
    """
    return isinstance(positions, int) or (isinstance(positions, TextSelector) and positions.which == "last_of")


def resolve(model: Reader, row: Row, positions: Any, label: str = "prompt") -> tuple[int, ...]:
    """Find the positions asked for in one prompt.

    Args:
        model: Whose tokenizer names tokens in errors.
        row: The prompt.
        positions: An index (negative counts from the row's last token), a slice, a selector, a list of these, or None
            for all; see `plain_positions`.
        label: How errors call the row.

    Returns:
        Indices over the row's own tokens, from 0 (padding is never counted).

    Raises:
        IndexError: The row has no such position; shows its tokens.
        TypeError: It is no position: a boolean, a float.
        ValueError: A text was given; the text of a selector is not in the prompt, or the prompt has no text; or a slice
            selects nothing of it.

    Example:
        from nnterp.inputs import encode

        print(positions.resolve(model, encode(model, "The capital of France is")[0], -1))  # → (4,)
    """
    return _resolved(model, row, plain_positions(positions), label)


def _resolved(model: Reader, row: Row, positions: Plain, label: str) -> tuple[int, ...]:
    if positions is None:
        return tuple(range(len(row)))
    if isinstance(positions, slice):
        found = tuple(range(len(row))[positions])
        if not found:
            raise ValueError(
                f"positions={shown_slice(positions)} selects nothing of {label}, which has {len(row)} tokens. "
                f"{describe(model, row)}"
            )
        return found
    if isinstance(positions, TextSelector):
        return _by_text(row, positions, label)
    if isinstance(positions, ImageSelector):
        return image_positions(row.ids, image_token_ids(model._module.config), positions.number, label)
    if isinstance(positions, int):
        try:
            return (within(positions, len(row), label, "tokens"),)
        except IndexError:
            raise IndexError(
                f"{label} has {len(row)} tokens, so there is no position {positions}. {describe(model, row)}"
            ) from None
    return tuple(found for position in positions for found in _resolved(model, row, position, label))


def describe(model: Reader, row: Row) -> str:
    """List a row's tokens with their positions, for errors; returns one line of text.

    Example:
        from nnterp.inputs import encode

        print(positions.describe(model, encode(model, "The capital")[0]))
    """
    names = model.tokenizer.convert_ids_to_tokens(list(row.ids))
    shown = [f"{i}:{name!r}" for i, name in enumerate(names)]
    if len(shown) > 40:
        shown = [*shown[:20], "…", *shown[-20:]]
    return f"Its tokens: {' '.join(shown)}"


def _by_text(row: Row, selector: TextSelector, label: str) -> tuple[int, ...]:
    if row.text is None or row.offsets is None:
        raise ValueError(
            f"{selector} needs the prompt's text and a fast tokenizer; {label} has only token ids. Give indices."
        )
    return overlapping(selector, row.text, list(row.offsets), label)
