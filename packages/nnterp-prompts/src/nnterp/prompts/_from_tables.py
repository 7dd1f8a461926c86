"""`prompts_from_table` and `pairs_from_table`: one prompt, or one pair, for each row of a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nnterp.prompts._errors import CollisionError, SharedTokenWarning
from nnterp.prompts._prompt import Prompt, PromptPair, Text
from nnterp.prompts._tables import Table, read_table
from nnterp.prompts._templates import (
    Row,
    Targets,
    Template,
    categories_of,
    corrupt_row,
    fill_answers,
    fill_template,
)
from nnterp.prompts._texts import prompt_tokens
from nnterp.prompts._tokens import collision_text, first_tokens, tokenizer_of
from nnterp.warn import warn


def prompts_from_table(
    template: Template,
    table: Table,
    targets: Targets,
    tokenizer_or_model: Any,
    *,
    chat: bool = False,
    distinct: bool = False,
) -> list[Prompt]:
    """Make one prompt for each row of a table.

    Args:
        template: A format string over the table's columns, such as "The capital of {country} is", or chat messages
            whose contents are format strings.
        table: A list of dicts, a DataFrame, or the path of a CSV, JSONL or JSON file; see `read_table`.
        targets: A format string, a list of them, or a dict that maps each category to one or several. A target that is
            just "{column}" takes every item of a list in that column.
        tokenizer_or_model: A tokenizer, or a model with one.
        chat: Put a text template into one user message, for the tokenizer's chat template.
        distinct: Raise if two categories of a prompt share a token. If False, one `SharedTokenWarning` says in how many
            prompts they do.

    Returns:
        The prompts. The `metadata` of each is its row.

    Raises:
        ValueError: The table is empty, or a column that the template or a target needs is missing or empty in a row.
        TokenizationError: A target has no token to track.
        CollisionError: `distinct=True`, and two categories of a prompt share a token.

    Example:
        table = [{"country": "France", "capital": "Paris"}, {"country": "Italy", "capital": "Rome"}]
        asked = prompts_from_table("The capital of {country} is", table, {"right": "{capital}"}, model)
        print(asked[1].prompt)  # → The capital of Italy is
    """
    tokenizer = tokenizer_of(tokenizer_or_model)
    rows = read_table(table)
    categories = categories_of(targets)
    filled = [
        (fill_template(template, row, i, chat, tokenizer), fill_answers(categories, row, i), row)
        for i, row in enumerate(rows)
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
    """Make a clean and a corrupted prompt for each row of a table.

    Args:
        template: As in `prompts_from_table`.
        table: As in `prompts_from_table`.
        target: A format string for the answer, or several. The corrupted answer is the same format string, filled in
            from the corrupted row.
        tokenizer_or_model: A tokenizer, or a model with one.
        corrupted: What the corrupted row has instead of the row's own values. Either a dict that maps columns to format
            strings, such as {"country": "{other_country}", "capital": "{other_capital}"}; or the name of a column, or
            several: their values are taken from the next row of the table that differs in all of them (after the last
            row comes the first).
        chat: As in `prompts_from_table`.
        same_length: Raise if the two prompts of a pair have different numbers of tokens. Patching by position needs
            equal numbers.

    Returns:
        The pairs. The `metadata` of both prompts is the clean row.

    Raises:
        ValueError: The table is empty; a column is missing or empty; the two prompts or the two answers of a row are
            the same; no other row differs in the corrupted columns; or `same_length=True` and the lengths differ.
        TokenizationError: A target has no token to track.

    Example:
        table = [{"country": "France", "capital": "Paris"}, {"country": "Italy", "capital": "Rome"}]
        other = ["country", "capital"]  # taken from the next row
        pairs = pairs_from_table("The capital of {country} is", table, "{capital}", model, corrupted=other)
        print(len(pairs), pairs[0].clean.prompt)  # → 2 The capital of France is
    """
    tokenizer = tokenizer_of(tokenizer_or_model)
    rows = read_table(table)
    filled: list[tuple[Text, dict[str, list[str]], Row]] = []
    for i, row in enumerate(rows):
        other = corrupt_row(rows, i, corrupted)
        texts = [fill_template(template, each, i, chat, tokenizer) for each in (row, other)]
        answers = {
            "clean": fill_answers({"target": target}, row, i)["target"],
            "corrupted": fill_answers({"target": target}, other, i)["target"],
        }
        _check_pair(texts, answers, i, tokenizer, same_length)
        filled += [(text, answers, row) for text in texts]
    made = iter(_make(filled, tokenizer, False))
    return [PromptPair(clean, bad) for clean, bad in zip(made, made, strict=True)]


def _check_pair(
    texts: Sequence[Text], answers: Mapping[str, Sequence[str]], index: int, tokenizer: Any, same_length: bool
) -> None:
    """Raise unless the prompts of a pair differ, their answers differ, and, if asked for, their lengths agree.

    Raises:
        ValueError: They do not.
    """
    if texts[0] == texts[1]:
        raise ValueError(
            f"Row {index}: the corrupted prompt is the clean one, {texts[0]!r:.100}. Corrupt a column that is in the "
            f"template."
        )
    if set(answers["clean"]) & set(answers["corrupted"]):
        raise ValueError(
            f"Row {index}: the clean and the corrupted prompt have the same answer, {answers['clean']}. Corrupt the "
            f"answer's column as well."
        )
    if same_length:
        clean, corrupted = (len(prompt_tokens(tokenizer, text)) for text in texts)
        if clean != corrupted:
            raise ValueError(
                f"Row {index}: the clean prompt has {clean} tokens and the corrupted one {corrupted}: "
                f"{texts[0]!r:.100} and {texts[1]!r:.100}. Leave the row out, or drop same_length=True."
            )


def _make(filled: Sequence[tuple[Text, dict[str, list[str]], Row]], tokenizer: Any, distinct: bool) -> list[Prompt]:
    """Make prompts from (prompt, answers, row). Each word is tokenized once."""
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
                raise CollisionError(f"Of {said}. Choose other words, or drop distinct=True.")
            colliding, example = colliding + 1, example or said
        prompts.append(prompt)
    if colliding:
        warn(
            f"In {colliding} of {len(prompts)} prompts categories begin with the same token, such as {example}. "
            f"tokenization_report(prompts, tokenizer) lists them.",
            SharedTokenWarning,
        )
    return prompts
