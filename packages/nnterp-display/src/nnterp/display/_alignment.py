"""Which columns of a sweep over several prompts can be averaged: those that are the same place in every prompt."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from nnterp.display._results import LabelledResult

_SELECTOR = re.compile(r"""(at|last_of)\(('([^'\\]|\\.)*'|"([^"\\]|\\.)*")(, -?\d+)?\)""")


def shared_columns(result: LabelledResult, chosen: Any = None) -> list[str] | None:
    """Check that each column of the axis "positions" is the same place in every prompt, and label the columns.

    A column that was asked for by its text (`at(...)`, `last_of(...)`) or as the last token (-1) is the same place in
    all prompts. Columns for every position are the same if the prompts are of one template (see `_same_template`). A
    few columns asked for by number are the same only if each holds the same token in every prompt.

    Args:
        result: A result with the axes "prompts" and "positions".
        chosen: The only column that is drawn; None or "mean" for all.

    Returns:
        The token of each column that was asked for by number; two of them where they differ ("Mary|John"). None if
        there is no such column, or if tokens are not known.

    Raises:
        ValueError: A column is not the same place in every prompt; the message says what to do.
    """
    labels = list(result.labels["positions"])
    prompts = len(result.labels["prompts"])
    rows = [list(row) for row in getattr(result, "tokens", ()) or ()]
    numbered = [i for i, label in enumerate(labels) if _is_number(label)]
    drawn = [i for i in numbered if chosen in (None, "mean", labels[i])]
    if prompts > 1 and drawn:
        if len(rows) < prompts:
            raise ValueError(_refusal("the result does not carry their tokens"))
        if labels == list(range(len(labels))):
            _require_one_template(rows)
        else:
            _require_same_tokens(rows, labels, drawn)
    if not rows or not numbered:
        return None
    return [_tokens_in(rows, i) if i in numbered else str(label) for i, label in enumerate(labels)]


def _is_number(label: Any) -> bool:
    """True if a column was asked for by a number of tokens from the start or the end, other than the last token."""
    if isinstance(label, int):
        return label != -1
    return any(char.isdigit() for char in _SELECTOR.sub("", str(label)))


def _require_one_template(rows: Sequence[Sequence[str | None]]) -> None:
    lengths = [sum(token is not None for token in row) for row in rows]
    for prompt, row in enumerate(rows):
        if lengths[prompt] != lengths[0]:
            raise ValueError(_refusal(f"prompt 0 has {lengths[0]} tokens and prompt {prompt} has {lengths[prompt]}"))
        if not _same_template(rows[0], row):
            raise ValueError(_refusal(f"prompts 0 and {prompt} are not of one template"))


def _same_template(first: Sequence[str | None], second: Sequence[str | None]) -> bool:
    """True if two equally long prompts differ only in what fills the slots of a template.

    At least half of their tokens agree, and no token of a stretch where they differ is elsewhere in the same stretch of
    the other prompt: that would be the same text, shifted.
    """
    pairs = list(zip(first, second, strict=True))
    if 2 * sum(a == b for a, b in pairs) < len(pairs):
        return False
    stretches = [list(group) for same, group in groupby(pairs, key=lambda pair: pair[0] == pair[1]) if not same]
    return all({a for a, _ in stretch}.isdisjoint(b for _, b in stretch) for stretch in stretches)


def _require_same_tokens(rows: Sequence[Sequence[str | None]], labels: Sequence[Any], columns: Sequence[int]) -> None:
    for column in columns:
        for prompt, row in enumerate(rows):
            if row[column] != rows[0][column]:
                raise ValueError(
                    _refusal(
                        f"position {labels[column]} is {rows[0][column]!r} in prompt 0 and {row[column]!r} in "
                        f"prompt {prompt}"
                    )
                )


def _refusal(why: str) -> str:
    return (
        f"The mean over prompts needs columns that are the same place in every prompt, but {why}. Draw one prompt with "
        f"prompt=0, prompt=1, ..., or make the result with positions named by text, such as at(...) or last_of(...)."
    )


def _tokens_in(rows: Sequence[Sequence[str | None]], column: int) -> str:
    """The token of a column; if prompts have different ones, the first two of them."""
    tokens = list(dict.fromkeys(row[column] or "" for row in rows))
    return "|".join(tokens[:2]) + ("|…" if len(tokens) > 2 else "")
