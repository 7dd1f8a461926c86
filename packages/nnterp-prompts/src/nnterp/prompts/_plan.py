"""What a run asks of the model: rows of tokens, questions at their positions, and how answers become scores.

Everything that can be wrong with prompts and targets is found here, before the model runs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch

from nnterp.inputs import Row, context_length, encode
from nnterp.prompts._errors import CollisionError, TokenizationError
from nnterp.prompts._prompt import Prompt, as_words, collision_text
from nnterp.prompts._tokens import continuations, encode_texts

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer

Scoring = Literal["first_token", "sequence"]
Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Question:
    """How probable is it that the token after `position` of a row is one of `tokens`?"""

    position: int
    tokens: Tokens


@dataclass
class Sheet:
    """One prompt's rows with their questions, and what its categories make of the answers.

    Attributes:
        rows: What the model reads.
        questions: For each row its questions.
        terms: For each category its alternatives, each the (row, question) pairs whose log-probabilities are added up.
    """

    rows: list[Row]
    questions: list[list[Question]]
    terms: list[list[list[tuple[int, int]]]]

    def combine(self, answers: Sequence[torch.Tensor], normalize_length: bool) -> torch.Tensor:
        """Log-probability of each category, `[categories]` or `[layers, categories]`.

        Args:
            answers: For each row the log-probabilities of its questions, `[questions]` or `[layers, questions]`.
            normalize_length: Take the mean over an alternative's tokens, and of a category its best alternative.
        """
        scores = []
        for alternatives in self.terms:
            each = []
            for terms in alternatives:
                logs = torch.stack([answers[row][..., question] for row, question in terms])
                each.append(logs.mean(0) if normalize_length else logs.sum(0))
            together = torch.stack(each)
            scores.append(together.amax(0) if normalize_length else together.logsumexp(0))
        return torch.stack(scores, dim=-1)


@dataclass
class Plan:
    """A whole run.

    Attributes:
        categories: Their names, in the order of the first prompt.
        sheets: One for each prompt.
        texts: For each prompt what it reads, chat templates applied.
        plain: Whether every prompt is a plain text, to be handed to a user's function as it is.
        fingerprints: For each prompt a digest of its rows and questions, by which a resumed run knows them.
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
) -> Plan:
    """Check prompts and targets, and turn them into rows and questions.

    Args:
        model: The model that will run.
        prompts: The prompts.
        scoring: Whether a target is its first tokens or its whole answers.
        teacher_forcing: Ask about all tokens of an answer in one row; otherwise each row asks at its last position
            only.
        answer_prefix: Put before a whole answer where neither it nor the end of the prompt is whitespace.
        distinct: Refuse categories of one prompt that share a token (or an answer).

    Raises:
        ValueError: There are no prompts, categories differ between prompts, a target is empty or outside the
            vocabulary, or a prompt (with its answer) is longer than the model's context.
        TokenizationError: An answer has no tokens.
        CollisionError: `distinct`, and categories collide.
    """
    prompts = [prompts] if isinstance(prompts, Prompt) else list(prompts)
    categories = _categories(prompts)
    rows = encode(model, [prompt.prompt for prompt in prompts])
    if scoring == "first_token":
        sheets = [
            _first_token_sheet(model, i, prompt, row, categories)
            for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True))
        ]
    elif scoring == "sequence":
        answers = _answers(model, prompts, rows, categories, answer_prefix)
        sheets = [_sequence_sheet(row, own, teacher_forcing) for row, own in zip(rows, answers, strict=True)]
        _check_lengths(model, sheets)
    else:
        raise ValueError(f"scoring={scoring!r}: there are 'first_token' and 'sequence'.")
    if distinct:
        _check_distinct(model, prompts, sheets, categories, scoring)
    texts = [row.text if row.text is not None else model.tokenizer.decode(list(row.ids)) for row in rows]
    plain = all(isinstance(prompt.prompt, str) for prompt in prompts)
    return Plan(categories, sheets, texts, plain, [_fingerprint(sheet) for sheet in sheets])


def _categories(prompts: list[Prompt]) -> tuple[str, ...]:
    if not prompts:
        raise ValueError("No prompts were given: pass at least one Prompt.")
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
                f"{i} "
                f"({prompt.prompt!r:.80}) has {sorted(prompt.target_tokens)}."
            )
    return categories


def _first_token_sheet(
    model: StandardizedTransformer, index: int, prompt: Prompt, row: Row, categories: tuple[str, ...]
) -> Sheet:
    questions = []
    for name in categories:
        tokens = tuple(dict.fromkeys(int(token) for token in prompt.target_tokens[name]))
        if not tokens:
            raise ValueError(f"Prompt {index} ({prompt.prompt!r:.80}): the target {name!r} has no tokens.")
        size = model.vocab_size
        if min(tokens) < 0 or (size is not None and max(tokens) >= size):
            raise ValueError(
                f"Prompt {index} ({prompt.prompt!r:.80}): tokens {list(tokens)} of the target {name!r} are not all "
                f"in the "
                f"model's vocabulary of {size}. Were they made with another model's tokenizer?"
            )
        questions.append(Question(len(row) - 1, tokens))
    return Sheet([row], [questions], [[[(0, i)]] for i in range(len(categories))])


def _answers(
    model: StandardizedTransformer, prompts: list[Prompt], rows: list[Row], categories: tuple[str, ...], prefix: str
) -> list[list[list[Tokens]]]:
    """For each prompt and category, the tokens of each of its answers as they follow the prompt."""
    wanted: list[list[list[str]]] = []
    pairs: dict[tuple[str, str], None] = {}
    for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        if prompt.target_strings is None or not set(categories) <= set(prompt.target_strings):
            raise ValueError(
                f"scoring='sequence' scores whole answers, but prompt {i} ({prompt.prompt!r:.80}) has no "
                f"target_strings for all "
                f"of {list(categories)}. Make prompts with Prompt.from_strings, or pass target_strings."
            )
        own = []
        for name in categories:
            words = as_words(name, prompt.target_strings[name])
            if empty := [word for word in words if not word]:
                raise TokenizationError(
                    f"Prompt {i} ({prompt.prompt!r:.80}): the target {name!r} holds {empty[0]!r}, an empty text."
                )
            own.append([_joined(prompt, row, word, prefix) for word in words])
        wanted.append(own)
        pairs.update({(row.text or "", text): None for group in own for text in group})
    spelled = _spelled(model.tokenizer, list(pairs))
    found = []
    for i, (prompt, row, own) in enumerate(zip(prompts, rows, wanted, strict=True)):
        for name, group in zip(categories, own, strict=True):
            for text in group:
                ids = spelled.get((row.text or "", text))
                if not ids:
                    raise TokenizationError(
                        f"Prompt {i} ({prompt.prompt!r:.80}): the answer {text!r} of {name!r} has no tokens."
                    )
                unknown = getattr(model.tokenizer, "unk_token_id", None)
                if unknown in ids and text.strip() != model.tokenizer.unk_token:
                    raise TokenizationError(
                        f"Prompt {i} ({prompt.prompt!r:.80}): the tokenizer does not know all of the answer {text!r} "
                        f"of {name!r}."
                    )
        found.append([[spelled[row.text or "", text] for text in group] for group in own])
    return found


def _joined(prompt: Prompt, row: Row, answer: str, prefix: str) -> str:
    """An answer with what stands between it and its prompt."""
    if answer[0].isspace() or not isinstance(prompt.prompt, str) or row.text is None or row.text[-1:].isspace():
        return answer
    return prefix + answer


def _spelled(tokenizer: object, pairs: list[tuple[str, str]]) -> dict[tuple[str, str], Tokens]:
    """Tokens of each (prompt, answer): what the answer adds to the prompt's, or else its own inside a text."""
    befores = {before: None for before, _ in pairs}
    heads = dict(zip(befores, encode_texts(tokenizer, list(befores)), strict=True))
    whole = dict(zip(pairs, encode_texts(tokenizer, [before + answer for before, answer in pairs]), strict=True))
    found: dict[tuple[str, str], Tokens] = {}
    for pair, ids in whole.items():
        head = heads[pair[0]]
        if head and ids[: len(head)] == head and len(ids) > len(head):
            found[pair] = tuple(ids[len(head) :])
    left = [pair for pair in pairs if pair not in found]
    inside = continuations(tokenizer, [answer for _, answer in left])
    found.update({pair: tuple(inside[pair[1]]) for pair in left if pair[1] in inside})
    return found


def _sequence_sheet(row: Row, categories: list[list[Tokens]], teacher_forcing: bool) -> Sheet:
    """Rows for all answers of one prompt; what answers have in common is read and asked once."""
    nodes = list(dict.fromkeys(answer[:k] for group in categories for answer in group for k in range(len(answer))))
    rows: list[Row] = []
    place: dict[Tokens, tuple[int, int]] = {}
    for node in sorted(nodes, key=len, reverse=True):
        if node in place:
            continue
        rows.append(row if not node else Row((*row.ids, *node)))
        place[node] = (len(rows) - 1, len(row) - 1 + len(node))
        if teacher_forcing:  # a causal model reads every shorter beginning on the way
            for k in range(len(node)):
                place.setdefault(node[:k], (len(rows) - 1, len(row) - 1 + k))
    questions: list[list[Question]] = [[] for _ in rows]
    asked: dict[tuple[Tokens, int], tuple[int, int]] = {}

    def ask(node: Tokens, token: int) -> tuple[int, int]:
        if (node, token) not in asked:
            index, position = place[node]
            questions[index].append(Question(position, (token,)))
            asked[node, token] = (index, len(questions[index]) - 1)
        return asked[node, token]

    terms = [
        [[ask(answer[:k], answer[k]) for k in range(len(answer))] for answer in _disjoint(group)]
        for group in categories
    ]
    return Sheet(rows, questions, terms)


def _disjoint(answers: list[Tokens]) -> list[Tokens]:
    """The answers without those that continue another: their probability is part of the shorter one's."""
    distinct = list(dict.fromkeys(answers))
    return [a for a in distinct if not any(a != b and a[: len(b)] == b for b in distinct)]


def _check_lengths(model: StandardizedTransformer, sheets: list[Sheet]) -> None:
    limit = context_length(model)
    for i, sheet in enumerate(sheets):
        longest = max(len(row) for row in sheet.rows)
        if limit is not None and longest > limit:
            raise ValueError(
                f"Prompt {i} with its longest answer has {longest} tokens; {model.anatomy.model_class} was built for "
                f"at most {limit}."
            )


def _check_distinct(
    model: StandardizedTransformer,
    prompts: list[Prompt],
    sheets: list[Sheet],
    categories: tuple[str, ...],
    scoring: Scoring,
) -> None:
    for i, (prompt, sheet) in enumerate(zip(prompts, sheets, strict=True)):
        if scoring == "first_token":
            shared = prompt.collisions()
            text = collision_text(shared, model.tokenizer) if shared else ""
        else:
            owners: dict[tuple, list[str]] = {}
            for name, alternatives in zip(categories, sheet.terms, strict=True):
                for terms in alternatives:
                    owners.setdefault(tuple(terms), []).append(name)
            text = "; ".join(
                f"{', '.join(map(repr, names))} share an answer" for names in owners.values() if len(names) > 1
            )
        if text:
            raise CollisionError(f"Prompt {i} ({prompt.prompt!r:.80}): {text}, and the targets were to be distinct.")


def _fingerprint(sheet: Sheet) -> str:
    told = [
        [list(row.ids) for row in sheet.rows],
        [[[q.position, *q.tokens] for q in qs] for qs in sheet.questions],
        sheet.terms,
    ]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]
