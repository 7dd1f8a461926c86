"""Check that the positions of a result mean the same in every prompt, so that prompts may be averaged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nnterp.display._results.labelled import LabelledResult, token_rows

Row = Sequence[str | None]
"""The text of one prompt's token in each column, None past the prompt's end."""

_REMEDY = (
    "Draw one prompt with prompt=i, or make the result with positions that are found in every prompt, such as "
    "nnterp.positions.last_of(...)."
)


def check_aligned(result: LabelledResult, columns: Sequence[int]) -> None:
    """Check that each of these columns of the axis "positions" is the same thing in all prompts.

    A column that was found by a selector is, and so is the last token (-1). Columns that are other indices are if the
    prompts have the same tokens in them as far as they go (`begin_alike`), or one template (`same_template`).

    Raises:
        ValueError: They do not; the message shows a column in which two prompts differ, and says what to do.
    """
    labels = list(result.labels["positions"])
    if not any(is_index(labels[i]) for i in columns):
        return
    if not token_rows(result):
        raise ValueError(f"This result does not have its prompts' tokens, so their positions may not match. {_REMEDY}")
    indices = [i for i, label in enumerate(labels) if is_index(label)]
    rows = [[row[i] for i in indices] for row in token_rows(result)]
    longest = max(range(len(rows)), key=lambda prompt: len(_own(rows[prompt])))
    for prompt, row in enumerate(rows):
        if begin_alike(rows[longest], row) or same_template(rows[longest], row):
            continue
        place = next(i for i, (a, b) in enumerate(zip(rows[longest], row, strict=True)) if a != b)
        raise ValueError(
            f"The positions of prompts {longest} and {prompt} do not match: at {labels[indices[place]]} one has "
            f"{rows[longest][place]!r} and the other {row[place]!r}. {_REMEDY}"
        )


def is_index(label: Any) -> bool:
    """True for the label of a column that is an index; False for a selector, and for -1, the last token."""
    return isinstance(label, int) and label != -1


def begin_alike(one: Row, other: Row) -> bool:
    """True if two prompts have the same tokens up to the end of the shorter one."""
    return all(a == b for a, b in zip(one, other, strict=True) if a is not None and b is not None)


def same_template(one: Row, other: Row) -> bool:
    """True if two prompts look like one template with different words in it.

    They have the same number of tokens, more than half of the tokens are the same, and moving one prompt against the
    other makes no more tokens match. So "The capital of Sri Lanka is" and "The capital city of France is" are not.
    """
    a, b = _own(one), _own(other)
    different = [i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y]
    if len(a) != len(b) or 2 * len(different) >= len(a):
        return False
    if not different:
        return True
    start, end = different[0], different[-1] + 1
    return _most_matches(a[start:end], b[start:end]) == end - start - len(different)


def _own(row: Row) -> list[str]:
    return [token for token in row if token is not None]


def _most_matches(one: Sequence[str], other: Sequence[str]) -> int:
    """How many tokens match at most, in the same order (the longest common subsequence)."""
    best = [0] * (len(other) + 1)
    for a in one:
        above, best = best, [0]
        for j, b in enumerate(other):
            best.append(above[j] + 1 if a == b else max(above[j + 1], best[j]))
    return best[-1]
