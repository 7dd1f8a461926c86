"""A task: clean and corrupted prompts with the tokens that answer the clean ones rightly and wrongly."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from nnterp.arguments import count
from nnterp.indices import integer
from nnterp.prompts._errors import TokenizationError
from nnterp.prompts._prompt import Prompt


@dataclass(frozen=True)
class Task:
    """Pairs of prompts, in one order. The two prompts of a pair have equally many tokens.

    Attributes:
        name: What the task is called.
        clean: The prompts that have the behaviour.
        corrupted: For each, a prompt that differs in what the behaviour depends on.
        correct: For each pair, ids of the next tokens that are right after the clean prompt.
        wrong: For each pair, ids of the next tokens that are wrong there.

    Example:
        task = tasks.capitals(model, n=4)
        results = run_prompts(model, task.prompts())
        print(results.accuracy("correct"))  # → 1.0
    """

    name: str
    clean: list[str]
    corrupted: list[str]
    correct: list[list[int]]
    wrong: list[list[int]]

    def __len__(self) -> int:
        return len(self.clean)

    def __repr__(self) -> str:
        return f"Task({self.name}, {len(self)} pairs: {self.clean[0]!r}, ...)"

    def prompts(self) -> list[Prompt]:
        """Make prompts for `nnterp.prompts.run_prompts`.

        Returns:
            The clean prompts, with the targets "correct" and "wrong".
        """
        pairs = zip(self.clean, self.correct, self.wrong, strict=True)
        return [Prompt(text, {"correct": good, "wrong": bad}) for text, good, bad in pairs]


@dataclass(frozen=True)
class Pair:
    """One clean and one corrupted prompt, with the right and wrong next tokens of the clean one."""

    clean: str
    corrupted: str
    correct: list[int]
    wrong: list[int]


def task_of(name: str, pairs: Sequence[Pair]) -> Task:
    """The task of these pairs."""
    return Task(
        name,
        [pair.clean for pair in pairs],
        [pair.corrupted for pair in pairs],
        [pair.correct for pair in pairs],
        [pair.wrong for pair in pairs],
    )


def drawn(n: Any, seed: Any) -> Iterator[random.Random]:
    """`n` times the same random generator, made from a seed.

    Raises:
        ValueError: `n` is not positive.
        TypeError: `n` or `seed` is no integer.
    """
    n, generator = count(n, "n"), random.Random(integer(seed, "seed"))
    return (generator for _ in range(n))


def tokens_of(tokenizer: Any, text: str) -> list[int]:
    """The token ids of a text, without special tokens."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def continuation(tokenizer: Any, prompt: str, rest: str) -> list[int] | None:
    """The token ids with which a text goes on after a prompt; None if the tokenizer merges the two."""
    before, whole = tokens_of(tokenizer, prompt), tokens_of(tokenizer, prompt + rest)
    return whole[len(before) :] if len(whole) > len(before) and whole[: len(before)] == before else None


def usable(tokenizer: Any, pair: Pair) -> Pair:
    """The pair, if its prompts have equally many tokens.

    Raises:
        TokenizationError: They do not.
    """
    clean, corrupted = tokens_of(tokenizer, pair.clean), tokens_of(tokenizer, pair.corrupted)
    if len(clean) != len(corrupted):
        raise TokenizationError(
            f"{pair.clean!r} is {len(clean)} tokens, {pair.corrupted!r} {len(corrupted)}; a pair needs equally many. "
            "Choose words that this tokenizer writes as one token inside a text."
        )
    return pair
