"""Capitals: one fact of a country, in one sentence."""

from __future__ import annotations

from typing import Any

from nnterp.prompts._errors import TokenizationError
from nnterp.prompts._tokens import is_lone_space, tokenizer_of
from nnterp.prompts.tasks._task import Pair, Task, continuation, drawn, task_of, tokens_of, usable

TEMPLATE = "The capital of {country} is"
CAPITALS = {
    "France": "Paris",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Germany": "Berlin",
    "Japan": "Tokyo",
    "England": "London",
    "Russia": "Moscow",
    "China": "Beijing",
    "Egypt": "Cairo",
    "Greece": "Athens",
    "Austria": "Vienna",
    "Portugal": "Lisbon",
    "Ireland": "Dublin",
    "Norway": "Oslo",
    "Sweden": "Stockholm",
    "Poland": "Warsaw",
    "Cuba": "Havana",
    "Peru": "Lima",
    "Canada": "Ottawa",
    "Kenya": "Nairobi",
    "Hungary": "Budapest",
    "Denmark": "Copenhagen",
    "Finland": "Helsinki",
    "Belgium": "Brussels",
}


def capitals(tokenizer: Any, n: int = 24, seed: int = 0) -> Task:
    """ "The capital of France is", corrupted to another country with as many tokens.

    The metric of the task is `logit_difference(task.correct, task.wrong)`. A capital of several tokens is told by its
    first.

    Args:
        tokenizer: A tokenizer, or a model with one.
        n: Number of pairs, drawn with repetition.
        seed: Of the random draw. The same tokenizer, `n` and seed give the same pairs.

    Returns:
        A `Task`. `correct` is the capital's token, and `wrong` that of the corrupted prompt's country.

    Raises:
        TokenizationError: No two countries have equally many tokens and capitals that begin with different ones.
        ValueError: `n` is not positive.

    Example:
        task = tasks.capitals(model, n=4)
        print(len(task), task.clean[0] != task.corrupted[0])  # → 4 True
    """
    tokenizer = tokenizer_of(tokenizer)
    known: dict[str, tuple[int, int]] = {}  # country → its number of tokens, its capital's first token
    for country, capital in CAPITALS.items():
        prompt = TEMPLATE.format(country=country)
        ids = continuation(tokenizer, prompt, f" {capital}")
        if ids is not None and ids[0] != tokenizer.unk_token_id and not is_lone_space(tokenizer, ids[0]):
            known[country] = len(tokens_of(tokenizer, prompt)), ids[0]
    partners = {
        country: [other for other, (size, first) in known.items() if size == own[0] and first != own[1]]
        for country, own in known.items()
    }
    able = [country for country in known if partners[country]]
    if not able:
        raise TokenizationError(
            f"capitals() needs two countries with equally many tokens and capitals that begin with different ones; of "
            f"{len(CAPITALS)} countries this tokenizer has {len(known)} whose capital continues the sentence."
        )
    pairs = []
    for rng in drawn(n, seed):
        country = rng.choice(able)
        other = rng.choice(partners[country])
        clean, corrupted = (TEMPLATE.format(country=name) for name in (country, other))
        pairs.append(usable(tokenizer, Pair(clean, corrupted, [known[country][1]], [known[other][1]])))
    return task_of("capitals", pairs)
