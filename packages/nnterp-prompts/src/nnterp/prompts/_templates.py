"""Sets of prompts out of a format string and a table; clean and corrupted ones out of the same row."""

from __future__ import annotations

import string
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nnterp.prompts._errors import CollisionError, SharedTokenWarning
from nnterp.prompts._prompt import Prompt, Text, as_words, collision_text
from nnterp.prompts._tables import Table, read_table
from nnterp.prompts._tokens import first_tokens, tokenizer_of

Template = str | Sequence[Mapping[str, str]]
Targets = str | Sequence[str] | Mapping[str, str | Sequence[str]]
Row = Mapping[str, Any]


@dataclass(frozen=True)
class PromptPair:
    """Two prompts that differ in what should change the answer.

    Both track the same categories: "clean", the answer to the clean prompt, and "corrupted", that to the corrupted one.
    """

    clean: Prompt
    corrupted: Prompt

    def __iter__(self) -> Iterator[Prompt]:
        return iter((self.clean, self.corrupted))


def prompts_from_table(
    template: Template,
    table: Table,
    targets: Targets,
    tokenizer_or_model: Any,
    *,
    chat: bool = False,
    distinct: bool = False,
) -> list[Prompt]:
    """One prompt for each row of a table.

    Args:
        template: A format string over the table's columns, "The capital of {country} is", or chat messages whose
            contents are format strings.
        table: See `read_table`.
        targets: Format strings: one, several, or a dict of categories of these. A target that is just "{column}" may
            find a list in that column, and then takes all of it.
        tokenizer_or_model: A tokenizer, or a model with one.
        chat: Put a text template into one message of a user, for the tokenizer's chat template.
        distinct: Refuse prompts in which two categories share a token; otherwise their number is reported by a
            `SharedTokenWarning`.

    Returns:
        Prompts with their row as `metadata`.

    Raises:
        ValueError: The table is empty, or the template or a target needs a column that a row does not have or leaves
            empty.
        TokenizationError: A target has no token to track.
        CollisionError: `distinct`, and two categories collide.
    """
    tokenizer = tokenizer_of(tokenizer_or_model)
    rows = read_table(table)
    categories = _categories(targets)
    filled = [
        (_text(template, row, i, chat, tokenizer), _answers(categories, row, i), row) for i, row in enumerate(rows)
    ]
    return _make(filled, tokenizer, distinct)


def pairs_from_table(
    template: Template,
    table: Table,
    target: str | Sequence[str],
    tokenizer_or_model: Any,
    corrupted: Mapping[str, str] | Sequence[str] | str,
    *,
    chat: bool = False,
    same_length: bool = False,
) -> list[PromptPair]:
    """A clean and a corrupted prompt for each row of a table.

    Args:
        template: As in `prompts_from_table`.
        table: See `read_table`.
        target: Format string of the answer, or several; the corrupted answer is the same of the corrupted row.
        tokenizer_or_model: A tokenizer, or a model with one.
        corrupted: What the corrupted row has instead: a dict of columns and format strings for them ({"country":
            "{other_country}", "capital": "
            ""{other_capital}"}), or columns whose values are taken from the next row of the
            table in which they all differ, the first row following the last.
        chat: As in `prompts_from_table`.
        same_length: Refuse pairs whose prompts have different numbers of tokens, which patching by position needs.

    Raises:
        ValueError: As `prompts_from_table`; or both prompts, or both answers, of a row are the same; or no other row
            differs; or, with `same_length`, the numbers of tokens do.
        TokenizationError: A target has no token to track.
    """
    from nnterp.prompts._report import prompt_tokens

    tokenizer = tokenizer_of(tokenizer_or_model)
    rows = read_table(table)
    filled = []
    for i, row in enumerate(rows):
        other = _corrupt(rows, i, corrupted)
        texts = [_text(template, each, i, chat, tokenizer) for each in (row, other)]
        answers = {
            "clean": _answers({"target": target}, row, i)["target"],
            "corrupted": _answers({"target": target}, other, i)["target"],
        }
        if texts[0] == texts[1]:
            raise ValueError(
                f"Row {i}: the corrupted prompt is the clean one, {texts[0]!r:.100}. Corrupt a column that is in the "
                f"template."
            )
        if set(answers["clean"]) & set(answers["corrupted"]):
            raise ValueError(
                f"Row {i}: the clean and the corrupted prompt have the same answer, {answers['clean']}. Corrupt the "
                f"answer's "
                f"column as well."
            )
        if same_length:
            lengths = [len(prompt_tokens(tokenizer, text)) for text in texts]
            if lengths[0] != lengths[1]:
                raise ValueError(
                    f"Row {i}: the clean prompt has {lengths[0]} tokens and the corrupted one {lengths[1]}: "
                    f"{texts[0]!r:.100} and "
                    f"{texts[1]!r:.100}. Leave the row out, or drop same_length=True."
                )
        filled += [(text, answers, row) for text in texts]
    made = iter(_make(filled, tokenizer, False))
    return [PromptPair(clean, bad) for clean, bad in zip(made, made, strict=True)]


def _make(filled: Sequence[tuple[Text, dict[str, list[str]], Row]], tokenizer: Any, distinct: bool) -> list[Prompt]:
    """The prompts; each word is tokenized once."""
    tokens = first_tokens((word for _, answers, _ in filled for group in answers.values() for word in group), tokenizer)
    prompts, colliding, example = [], 0, ""
    for i, (text, answers, row) in enumerate(filled):
        tracked = {
            name: list(dict.fromkeys(t for word in group for t in tokens[word])) for name, group in answers.items()
        }
        prompt = Prompt(text, tracked, dict(answers), dict(row))
        if shared := prompt.collisions():
            said = f"prompt {i} ({text!r:.80}): {collision_text(shared, tokenizer)}"
            if distinct:
                raise CollisionError(f"Of {said}. They were to be distinct: choose other words, or drop distinct=True.")
            colliding, example = colliding + 1, example or said
        prompts.append(prompt)
    if colliding:
        warnings.warn(
            f"In {colliding} of {len(prompts)} prompts categories begin with the same token, such as {example}. "
            f"tokenization_report(prompts, tokenizer) lists them.",
            SharedTokenWarning,
            stacklevel=3,
        )
    return prompts


def _categories(targets: Targets) -> dict[str, Any]:
    categories = dict(targets) if isinstance(targets, Mapping) else {"target": targets}
    if not categories:
        raise ValueError("targets is empty: give a format string, or a dict of at least one category.")
    return categories


def _answers(categories: Mapping[str, Any], row: Row, index: int) -> dict[str, list[str]]:
    found = {}
    for name, patterns in categories.items():
        words: list[str] = []
        for pattern in as_words(name, patterns):
            pieces = list(string.Formatter().parse(pattern))
            value = row.get(pieces[0][1]) if len(pieces) == 1 and not pieces[0][0] and pieces[0][1] else None
            words += [str(v) for v in value] if isinstance(value, (list, tuple)) else [_format(pattern, row, index)]
        found[name] = as_words(name, words)
    return found


def _text(template: Template, row: Row, index: int, chat: bool, tokenizer: Any) -> Text:
    if isinstance(template, str):
        text = _format(template, row, index)
        if not chat:
            return text
        messages = [{"role": "user", "content": text}]
    else:
        messages = [{**message, "content": _format(message["content"], row, index)} for message in template]
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("Chat messages were asked for, but the tokenizer has no chat template: use a text template.")
    return messages


def _format(pattern: str, row: Row, index: int) -> str:
    """`pattern.format_map(row)`, which says what is missing."""
    for _, column, _, _ in string.Formatter().parse(pattern):
        if column is None:
            continue
        if column not in row:
            raise ValueError(
                f"{pattern!r} needs the column {column!r}; row {index} of the table has: {', '.join(map(repr, row))}."
            )
        value = row[column]
        if value is None or value == "" or value != value:  # NaN of a data frame
            raise ValueError(
                f"{pattern!r} needs the column {column!r}, which is empty in row {index} of the table: "
                f"{dict(row)!r:.120}"
            )
    return string.Formatter().vformat(pattern, (), row)


def _corrupt(
    rows: list[dict[str, Any]], index: int, corrupted: Mapping[str, str] | Sequence[str] | str
) -> dict[str, Any]:
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
        return {**row, **{column: _format(pattern, row, index) for column, pattern in corrupted.items()}}
    for step in range(1, len(rows)):
        other = rows[(index + step) % len(rows)]
        if all(column in other and other[column] != row[column] for column in columns):
            return {**row, **{column: other[column] for column in columns}}
    raise ValueError(
        f"Row {index}: no other row of the table differs in {columns}, so there is nothing to corrupt it with."
    )
