"""What one prompt asks of the model: rows of tokens, questions about them, and how the answers become scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nnterp.inputs import Row

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Question:
    """How probable is it that the token after `position` of a row is one of `tokens`?"""

    position: int
    tokens: Tokens


@dataclass
class Sheet:
    """The rows of one prompt, the questions about them, and how each category is computed from the answers.

    Attributes:
        rows: The token rows that the model reads.
        questions: The questions about each row.
        terms: For each category a list of alternatives. An alternative is a list of (row, question) indices whose
            log-probabilities are added up.
    """

    rows: list[Row]
    questions: list[list[Question]]
    terms: list[list[list[tuple[int, int]]]]

    def combine(self, answers: Sequence[torch.Tensor], normalize_length: bool) -> torch.Tensor:
        """Return the log-probability of each category, `[categories]` or `[layers, categories]`.

        Args:
            answers: For each row the log-probabilities of its questions, `[questions]` or `[layers, questions]`.
            normalize_length: Score an alternative by the mean over its tokens, and a category by its best alternative.
                If False, an alternative is the sum over its tokens, and a category is the log of the sum of the
                probabilities of its alternatives.
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


def first_token_sheet(row: Row, targets: Sequence[Tokens]) -> Sheet:
    """Return the sheet of a prompt that is asked about the token after its last one.

    Args:
        row: The prompt's tokens.
        targets: The tokens of each category.
    """
    questions = [Question(len(row) - 1, tokens) for tokens in targets]
    return Sheet([row], [questions], [[[(0, i)]] for i in range(len(questions))])


def sequence_sheet(row: Row, categories: Sequence[Sequence[Tokens]], teacher_forcing: bool) -> Sheet:
    """Return the sheet of a prompt that is asked about whole answers.

    Tokens that several answers begin with are read and asked about once.

    Args:
        row: The prompt's tokens.
        categories: The answers of each category, each once. Every one of them is asked about.
        teacher_forcing: Ask about every token of an answer in one row. If False, there is a row for each beginning of
            an answer, which is asked only about the token after its last one.
    """
    nodes = list(dict.fromkeys(answer[:k] for group in categories for answer in group for k in range(len(answer))))
    rows: list[Row] = []
    place: dict[Tokens, tuple[int, int]] = {}
    for node in sorted(nodes, key=len, reverse=True):
        if node in place:
            continue
        rows.append(row if not node else Row((*row.ids, *node)))
        place[node] = (len(rows) - 1, len(row) - 1 + len(node))
        if teacher_forcing:  # in a causal model, the row of a long beginning also answers for the shorter ones
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

    terms = [[[ask(answer[:k], answer[k]) for k in range(len(answer))] for answer in group] for group in categories]
    return Sheet(rows, questions, terms)


def without_continuations(answers: Sequence[Tokens]) -> list[Tokens]:
    """Drop answers that continue another one: their probability is part of the shorter answer's."""
    return [a for a in answers if not any(a != b and a[: len(b)] == b for b in answers)]
