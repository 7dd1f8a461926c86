"""Check prompts and targets before the model runs, and turn them into rows and questions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from nnterp import StandardizedTransformer
from nnterp.inputs import context_length, encode
from nnterp.prompts._answers import answers_of
from nnterp.prompts._errors import CollisionError
from nnterp.prompts._ids import ids_of_categories
from nnterp.prompts._prompt import Prompt
from nnterp.prompts._questions import Sheet, Tokens, first_token_sheet, sequence_sheet, without_continuations
from nnterp.prompts._tokens import collision_text

Scoring = Literal["first_token", "sequence"]


@dataclass
class Plan:
    """Everything that a run asks of the model.

    Attributes:
        categories: Names of the categories, in the order of the first prompt.
        sheets: The rows and questions of each prompt.
        texts: The text that the model reads for each prompt, after the chat template if it is a chat.
        plain: True if every prompt is a plain text, which a user's function can be given as it is.
        fingerprints: A digest of each prompt's rows and questions, by which a resumed run recognises them.
    """

    categories: tuple[str, ...]
    sheets: list[Sheet]
    texts: list[str]
    plain: bool
    fingerprints: list[str] = field(default_factory=list)


def make_plan(
    model: StandardizedTransformer,
    prompts: Sequence[Prompt],
    scoring: Scoring = "first_token",
    teacher_forcing: bool = True,
    answer_prefix: str = " ",
    distinct: bool = False,
    normalize_length: bool = False,
) -> Plan:
    """Check prompts and targets, and turn them into rows and questions. Without prompts, the plan is empty.

    Args:
        model: The model that will run.
        prompts: The prompts.
        scoring: "first_token" for the first tokens of a target, "sequence" for its whole answers.
        teacher_forcing: See `sequence_sheet`.
        answer_prefix: Text between a prompt and a whole answer, if neither has whitespace there.
        distinct: Raise if two categories of a prompt share a token (or an answer).
        normalize_length: Ask about every answer. If False, an answer that continues another one of its category is left
            out, because the other one's probability includes it.

    Raises:
        ValueError: Prompts have different categories, a target is empty or outside the vocabulary, or a prompt (with
            its answer) is longer than the model's context.
        TokenizationError: An answer has no tokens.
        CollisionError: `distinct=True`, and two categories share a token or an answer.
    """
    prompts = [prompts] if isinstance(prompts, Prompt) else list(prompts)
    if scoring not in ("first_token", "sequence"):
        raise ValueError(f"scoring={scoring!r}: there are 'first_token' and 'sequence'.")
    if not prompts:
        return Plan((), [], [], plain=True)
    categories = _categories(prompts)
    rows = encode(model, [prompt.prompt for prompt in prompts], images=True)
    if scoring == "sequence" and any(row.images is not None or row.encoder is not None for row in rows):
        raise ValueError(
            'scoring="sequence" reads answers after a text; prompts with images, and those of encoder-decoder models, '
            'take "first_token".'
        )
    if scoring == "first_token":
        targets = [_targets(model, i, prompt, categories) for i, prompt in enumerate(prompts)]
        if distinct:
            _check_tokens_distinct(model, prompts)
        sheets = [first_token_sheet(row, own) for row, own in zip(rows, targets, strict=True)]
    else:
        answers = answers_of(model, prompts, rows, categories, answer_prefix)
        if distinct:
            _check_answers_distinct(prompts, categories, answers)
        if not normalize_length:
            answers = [[without_continuations(group) for group in own] for own in answers]
        sheets = [sequence_sheet(row, own, teacher_forcing) for row, own in zip(rows, answers, strict=True)]
        _check_lengths(model, sheets)
    texts = [row.words(model.tokenizer) for row in rows]
    plain = all(isinstance(prompt.prompt, str) for prompt in prompts)
    return Plan(categories, sheets, texts, plain, [_fingerprint(sheet) for sheet in sheets])


def _categories(prompts: Sequence[Prompt]) -> tuple[str, ...]:
    """Return the categories that all prompts have.

    Raises:
        ValueError: There are no categories, or prompts have different ones.
        TypeError: Something is not a `Prompt`.
    """
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, Prompt):
            raise TypeError(
                f"Prompt {i} is a {type(prompt).__name__}; make it with Prompt.from_strings(text, targets, model)."
            )
    categories = tuple(prompts[0].target_tokens)
    if not categories:
        raise ValueError("Prompt 0 has no targets: give it at least one category.")
    for i, prompt in enumerate(prompts):
        if set(prompt.target_tokens) != set(categories):
            raise ValueError(
                f"All prompts must have the same target keys (categories). Prompt 0 has {sorted(categories)}; prompt "
                f"{i} ({prompt.prompt!r:.80}) has {sorted(prompt.target_tokens)}."
            )
    return categories


def _targets(model: StandardizedTransformer, index: int, prompt: Prompt, categories: Sequence[str]) -> list[Tokens]:
    """Return the distinct token ids of each category of one prompt.

    Raises:
        TypeError: A token is not an integer.
        ValueError: A category has no tokens, or one outside the vocabulary.
    """
    where = f"Prompt {index} ({prompt.prompt!r:.80})"
    found = ids_of_categories(prompt.target_tokens, model.vocab_size, where)
    for name, tokens in found.items():
        if not tokens:
            raise ValueError(f"{where}: the target {name!r} has no tokens.")
    return [found[name] for name in categories]


def _check_lengths(model: StandardizedTransformer, sheets: Sequence[Sheet]) -> None:
    """Raise if a prompt with its longest answer does not fit into the model's context.

    Raises:
        ValueError: It does not.
    """
    limit = context_length(model)
    for i, sheet in enumerate(sheets):
        longest = max(len(row) for row in sheet.rows)
        if limit is not None and longest > limit:
            raise ValueError(
                f"Prompt {i} with its longest answer has {longest} tokens; {model.anatomy.model_class} was built for "
                f"at most {limit}."
            )


def _check_tokens_distinct(model: StandardizedTransformer, prompts: Sequence[Prompt]) -> None:
    """Raise if two categories of a prompt share a token.

    Raises:
        CollisionError: They do.
    """
    for i, prompt in enumerate(prompts):
        if shared := prompt.collisions():
            raise CollisionError(
                f"Prompt {i} ({prompt.prompt!r:.80}): {collision_text(shared, model.tokenizer)}. Choose other targets, "
                f"or drop distinct=True."
            )


def _check_answers_distinct(
    prompts: Sequence[Prompt], categories: Sequence[str], answers: Sequence[Sequence[Sequence[Tokens]]]
) -> None:
    """Raise if two categories of a prompt share an answer.

    Raises:
        CollisionError: They do.
    """
    for i, (prompt, own) in enumerate(zip(prompts, answers, strict=True)):
        owners: dict[Tokens, list[str]] = {}
        for name, group in zip(categories, own, strict=True):
            for answer in group:
                owners.setdefault(answer, []).append(name)
        shared = [f"{', '.join(map(repr, names))} share an answer" for names in owners.values() if len(names) > 1]
        if shared:
            raise CollisionError(
                f"Prompt {i} ({prompt.prompt!r:.80}): {'; '.join(shared)}. Choose other targets, or drop distinct=True."
            )


def _fingerprint(sheet: Sheet) -> str:
    """Return a digest of a prompt's rows and questions."""
    told = [
        [list(row.identity) for row in sheet.rows],
        [[[q.position, *q.tokens] for q in qs] for qs in sheet.questions],
        sheet.terms,
    ]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]
