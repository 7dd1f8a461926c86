"""Indirect object identification (Wang et al., "Interpretability in the Wild", 2022), in sentences of our own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

from nnterp.arguments import listed
from nnterp.prompts._errors import TokenizationError
from nnterp.prompts._tokens import tokenizer_of
from nnterp.prompts.tasks._task import Pair, Task, continuation, drawn, task_of, usable

Corruption: TypeAlias = Literal["abc", "swap"]

# Every name stands after a space. {giver} is the name that comes twice.
TEMPLATES = (
    "When {first} and {second} went to the {place}, {giver} gave a {thing} to",
    "After {first} and {second} walked through the {place}, {giver} handed a {thing} to",
    "While {first} and {second} were waiting at the {place}, {giver} offered a {thing} to",
    "Last week {first} and {second} met at the {place}, and {giver} brought a {thing} to",
    "Because {first} and {second} had a long day at the {place}, {giver} passed a {thing} to",
    "Then {first} and {second} came back from the {place}, where {giver} had given a {thing} to",
)
PLACES = ("store", "park", "school", "office", "station", "library", "museum", "market", "beach", "garden", "hospital")
THINGS = ("drink", "book", "ball", "ring", "letter", "flower", "key", "basket", "ticket", "hat", "phone", "gift")
NAMES = (
    "Mary John Tom James Anna Emma David Sarah Peter Paul Laura Kate Lucy Alice Bob Jack Mark Luke Mike Robert Daniel "
    "Simon Helen Julia Susan Linda Karen Kevin Brian Eric Steve Henry George William Edward Arthur Max Adam Sam Jane "
    "Grace Maria Martin Victor"
).split()
LEAST = 3  # names: two in a sentence and one that is in neither


def ioi(
    tokenizer: Any, n: int = 32, seed: int = 0, *, corrupted: Corruption = "abc", names: Sequence[str] | None = None
) -> Task:
    """Sentences with two names, one of which comes twice; the other one is the next word.

    "When Mary and John went to the store, John gave a drink to" goes on with " Mary". Half of the sentences, drawn at
    random, name the giver first. The metric of the task is `logit_difference(task.correct, task.wrong)`.

    Args:
        tokenizer: A tokenizer, or a model with one.
        n: Number of pairs.
        seed: Of the random draw. The same tokenizer, `n` and seed give the same pairs.
        corrupted: What differs in the corrupted prompt, which is the second mention of the giver. "abc": it is a third
            name, so neither name is the answer. "swap": it is the other name, so the answer is the giver.
        names: Names to draw from; those of `NAMES` if None. Taken are those that are one token after a space.

    Returns:
        A `Task`. `correct` is the name that comes once, and `wrong` is the giver.

    Raises:
        TokenizationError: Fewer than three names are one token of this tokenizer.
        ValueError: `corrupted` is none of the two, or `n` is not positive.

    Example:
        task = tasks.ioi(model, n=4)
        metric = logit_difference(task.correct, task.wrong)
    """
    tokenizer = tokenizer_of(tokenizer)
    if corrupted not in ("abc", "swap"):
        raise ValueError(f'corrupted is "abc" or "swap", not {corrupted!r}.')
    given = list(NAMES) if names is None else listed(names, "names", "a list of names")
    known = single_token_names(tokenizer, given)
    if len(known) < LEAST:
        raise TokenizationError(
            f"ioi() needs at least {LEAST} names that are one token after a space; of {len(given)} this tokenizer "
            f"has {len(known)} ({', '.join(known) or 'none'}). Pass names= with some that it has."
        )
    pairs = []
    for rng in drawn(n, seed):
        giver, receiver, third = rng.sample(known, 3)
        template, first = rng.choice(TEMPLATES), rng.random() < 0.5
        words = {
            "first": giver if first else receiver,
            "second": receiver if first else giver,
            "place": rng.choice(PLACES),
            "thing": rng.choice(THINGS),
        }
        clean = template.format(**words, giver=giver)
        other = template.format(**words, giver=third if corrupted == "abc" else receiver)
        correct, wrong = (_next(tokenizer, clean, name) for name in (receiver, giver))
        pairs.append(usable(tokenizer, Pair(clean, other, [correct], [wrong])))
    return task_of("ioi", pairs)


def single_token_names(tokenizer: Any, names: Sequence[str]) -> list[str]:
    """Of these names, those that are one token after a space inside a text, no two of the same token."""
    found: dict[int, str] = {}
    for name in names:
        ids = continuation(tokenizer, "We met", f" {name}")
        if ids is not None and len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
            found.setdefault(ids[0], name)
    return list(found.values())


def _next(tokenizer: Any, prompt: str, name: str) -> int:
    ids = continuation(tokenizer, prompt, f" {name}")
    if ids is None or len(ids) != 1:
        raise TokenizationError(f"{name!r} is not one token of this tokenizer after {prompt!r}.")
    return ids[0]
