"""Positions in a prompt: counted over its own tokens, or found by a piece of its text."""

from __future__ import annotations

from collections.abc import Sequence

from nnterp.inputs import Reader, Row
from nnterp.selectors import TextSelector, at, last_of, overlapping

__all__ = ["Positions", "TextSelector", "at", "describe", "last_of", "resolve"]


Positions = int | slice | TextSelector | Sequence["int | TextSelector"] | None


def resolve(model: Reader, row: Row, positions: Positions, label: str = "prompt") -> tuple[int, ...]:
    """The positions asked for, as indices over a row's own tokens from 0 (padding is never counted).

    Args:
        model: Whose tokenizer names tokens in errors.
        row: The prompt.
        positions: An index (negative counts from the row's last token), a slice, a selector, a list of these, or None
        for all.
        label: How errors call the row.

    Raises:
        IndexError: The row has no such position; shows its tokens.
        ValueError: The text is not in the prompt, or the prompt has no text.
    """
    if positions is None:
        return tuple(range(len(row)))
    if isinstance(positions, slice):
        return tuple(range(len(row))[positions])
    if isinstance(positions, TextSelector):
        return _by_text(row, positions, label)
    if hasattr(positions, "__index__"):
        index = positions.__index__()
        if not -len(row) <= index < len(row):
            raise IndexError(f"{label} has {len(row)} tokens, so there is no position {index}. {describe(model, row)}")
        return (index % len(row),)
    found: list[int] = []
    for position in positions:
        found.extend(resolve(model, row, position, label))
    return tuple(found)


def describe(model: Reader, row: Row) -> str:
    """A row's tokens with their positions, for errors."""
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
