"""Format strings filled in from a row of a table: prompts, answers and corrupted rows."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from typing import Any

from nnterp.prompts._prompt import Text
from nnterp.prompts._words import as_words

Template = str | Sequence[Mapping[str, str]]
Targets = str | Sequence[str] | Mapping[str, str | Sequence[str]]
Row = Mapping[str, Any]


def categories_of(targets: Targets) -> dict[str, Any]:
    """Return targets as a dict of categories; without a dict, the one category is called "target".

    Raises:
        ValueError: There are no categories.
    """
    categories = dict(targets) if isinstance(targets, Mapping) else {"target": targets}
    if not categories:
        raise ValueError("targets is empty: give a format string, or a dict of at least one category.")
    return categories


def fill_answers(categories: Mapping[str, Any], row: Row, index: int) -> dict[str, list[str]]:
    """Return the words of each category for one row.

    Args:
        categories: One format string, or several, for each category. A format string that is just "{column}" takes
            every item of a list in that column.
        row: The row.
        index: Its index, for messages.
    """
    found = {}
    for name, patterns in categories.items():
        words: list[str] = []
        for pattern in as_words(name, patterns):
            pieces = list(string.Formatter().parse(pattern))
            value = row.get(pieces[0][1]) if len(pieces) == 1 and not pieces[0][0] and pieces[0][1] else None
            words += [str(v) for v in value] if isinstance(value, (list, tuple)) else [_fill(pattern, row, index)]
        found[name] = as_words(name, words)
    return found


def fill_template(template: Template, row: Row, index: int, chat: bool, tokenizer: Any) -> Text:
    """Return the prompt for one row: a text, or chat messages.

    Raises:
        ValueError: A column is missing or empty, or chat messages are needed and the tokenizer has no chat template.
    """
    if isinstance(template, str):
        text = _fill(template, row, index)
        if not chat:
            return text
        messages = [{"role": "user", "content": text}]
    else:
        messages = [{**message, "content": _fill(message["content"], row, index)} for message in template]
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("Chat messages were asked for, but the tokenizer has no chat template: use a text template.")
    return messages


def corrupt_row(
    rows: list[dict[str, Any]], index: int, corrupted: Mapping[str, str] | Sequence[str] | str
) -> dict[str, Any]:
    """Return a copy of one row with other values in the corrupted columns; see `pairs_from_table`.

    Raises:
        ValueError: No column is named, a column is missing, or no other row differs in the columns.
    """
    row = rows[index]
    columns = [corrupted] if isinstance(corrupted, str) else list(corrupted)
    if not columns:
        raise ValueError("corrupted is empty: name at least one column.")
    for column in columns:
        if column not in row:
            raise ValueError(
                f"corrupted names the column {column!r}; row {index} of the table has: {', '.join(map(repr, row))}."
            )
    if isinstance(corrupted, Mapping):
        return {**row, **{column: _fill(pattern, row, index) for column, pattern in corrupted.items()}}
    for step in range(1, len(rows)):
        other = rows[(index + step) % len(rows)]
        if all(column in other and other[column] != row[column] for column in columns):
            return {**row, **{column: other[column] for column in columns}}
    raise ValueError(
        f"Row {index}: no other row of the table differs in {columns}, so there is nothing to corrupt it with."
    )


def _fill(pattern: str, row: Row, index: int) -> str:
    """Return `pattern.format_map(row)`; the error for a missing or empty column names it.

    Raises:
        ValueError: A column is missing or empty in this row.
    """
    for _, column, _, _ in string.Formatter().parse(pattern):
        if column is None:
            continue
        if column not in row:
            raise ValueError(
                f"{pattern!r} needs the column {column!r}; row {index} of the table has: {', '.join(map(repr, row))}."
            )
        value = row[column]
        if value is None or value == "" or value != value:  # NaN, as in a data frame
            raise ValueError(
                f"{pattern!r} needs the column {column!r}, which is empty in row {index} of the table: "
                f"{dict(row)!r:.120}"
            )
    return string.Formatter().vformat(pattern, (), row)
