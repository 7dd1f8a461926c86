"""Where a head of each kind attends to: pairs of a query and a key, and those of the null control."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from nnterp.inputs import Row
from nnterp.positions import describe

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer

# Position 0 is a sink of attention in most models, so it is a key of no kind but its own, nor of a control.


def _previous_token(ids: tuple[int, ...], query: int) -> list[int]:
    return [query - 1] if query > 1 else []


def _duplicate_token(ids: tuple[int, ...], query: int) -> list[int]:
    return [key for key in range(1, query) if ids[key] == ids[query]]


def _induction(ids: tuple[int, ...], query: int) -> list[int]:
    return [key for key in range(1, query) if ids[key - 1] == ids[query]]


def _first_token(ids: tuple[int, ...], query: int) -> list[int]:
    return [0] if query else []


KEYS: dict[str, Callable[[tuple[int, ...], int], list[int]]] = {
    "previous_token": _previous_token,
    "duplicate_token": _duplicate_token,
    "induction": _induction,
    "first_token": _first_token,
}
REPEATING = ("duplicate_token", "induction")  # kinds that depend on which tokens repeat
SHUFFLED = "the second halves shuffled so that no token keeps its place, attention at the same positions"
RANDOM_KEYS = "other keys of the same queries, as many, drawn at random; never position 0"


class Look(NamedTuple):
    """Attention from one query to one key of a row, which counts with a weight in a group."""

    row: int
    query: int
    key: int
    group: int
    weight: float


@dataclass(frozen=True)
class Plan:
    """What is run, and where its attention is read.

    Attributes:
        rows: The rows to run, those of the control included.
        looks: Where attention is read. Group `draw * prompts + prompt`; draw 0 is the kind itself, the others the
            control's.
        prompts: The prompts whose scores are asked for; they are the first rows.
        draws: Draws of the control.
        control: What the control is, in words.
    """

    rows: list[Row]
    looks: list[Look]
    prompts: list[Row]
    draws: int
    control: str


def on_random_sequences(
    kind: str, halves: Sequence[tuple[int, ...]], front: tuple[int, ...], draws: int, rng: random.Random
) -> Plan:
    """The plan on sequences of different tokens, each of which is repeated once."""
    rows = [Row((*front, *half, *half)) for half in halves]
    if kind not in REPEATING:
        return on_prompts(kind, rows, draws, rng, [""] * len(rows))
    shuffled = [Row((*front, *half, *_moved(half, rng))) for _ in range(draws) for half in halves]
    looks = []
    for i in range(len(rows) * (1 + draws)):
        pairs = [(q, k) for q in range(len(rows[0])) for k in KEYS[kind](rows[i % len(rows)].ids, q)]
        looks += [Look(i, q, k, i, 1 / len(pairs)) for q, k in pairs]  # one key for each query
    return Plan([*rows, *shuffled], looks, rows, draws, SHUFFLED)


def on_prompts(kind: str, rows: list[Row], draws: int, rng: random.Random, shown: Sequence[str]) -> Plan:
    """The plan on given prompts; `shown` says what each holds, for errors.

    Raises:
        ValueError: A prompt has no query of this kind.
    """
    looks = []
    for i, row in enumerate(rows):
        found = []
        for query in range(len(row)):
            keys = KEYS[kind](row.ids, query)
            others = [key for key in range(1, query + 1) if key not in keys]
            if keys and len(others) >= len(keys):
                found.append((query, keys, others))
        if not found:
            raise ValueError(
                f"Prompt {i} has no token from which {kind!r} could be told: for that kind it has to "
                f"{'repeat a token' if kind in REPEATING else 'have more tokens'}. {shown[i]}"
            )
        for query, keys, others in found:
            for draw in range(1 + draws):
                chosen = keys if draw == 0 else rng.sample(others, len(keys))
                looks += [Look(i, query, key, draw * len(rows) + i, 1 / len(found)) for key in chosen]
    return Plan(rows, looks, rows, draws, RANDOM_KEYS)


def on_targets(
    model: StandardizedTransformer, rows: list[Row], targets: torch.Tensor, draws: int, rng: random.Random
) -> Plan:
    """The plan of "name_mover": from each prompt's last token to its target token.

    Args:
        model: The model, whose tokenizer names tokens in errors.
        rows: The prompts.
        targets: Ids of each prompt's target tokens, `[prompts, most]`, padded with -1.
        draws: Draws of the control.
        rng: What the control is drawn with.

    Raises:
        ValueError: A target does not occur before its prompt's last token, or the prompt has no other token.
    """
    looks = []
    for i, (row, ids) in enumerate(zip(rows, targets.tolist(), strict=True)):
        query = len(row) - 1
        keys = [key for key in range(query) if row.ids[key] in ids]
        if not keys:
            wanted = model.tokenizer.convert_ids_to_tokens([t for t in ids if t >= 0])
            raise ValueError(
                f"Prompt {i} does not hold its target ({' or '.join(map(repr, wanted))}) before its last token, so no "
                f"head can move it. {describe(model, row)}"
            )
        others = [key for key in range(1, query) if key not in keys]
        if len(others) < len(keys):
            raise ValueError(f"Prompt {i} has too few tokens beside its target for a control. {describe(model, row)}")
        for draw in range(1 + draws):
            chosen = keys if draw == 0 else rng.sample(others, len(keys))
            looks += [Look(i, query, key, draw * len(rows) + i, 1.0) for key in chosen]
    return Plan(rows, looks, rows, draws, RANDOM_KEYS.replace("position 0", "position 0 or the last"))


def ordinary_tokens(model: StandardizedTransformer, count: int, rng: random.Random) -> tuple[int, ...]:
    """Different token ids that are words or pieces of words: nothing special, added, empty or without letters.

    Raises:
        ValueError: The vocabulary does not have so many.
    """
    tokenizer = model.tokenizer
    size = min(len(tokenizer), model.vocab_size or len(tokenizer))
    apart = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})}
    found: list[int] = []
    for token in rng.sample(range(size), size):
        if token not in apart and tokenizer.decode([token]).strip().isalnum():
            found.append(token)
        if len(found) == count:
            return tuple(found)
    raise ValueError(f"length={count}: this tokenizer has only {len(found)} ordinary tokens; take shorter sequences.")


def beginning(model: StandardizedTransformer) -> tuple[int, ...]:
    """The token that the tokenizer puts in front of a text, if it does."""
    begin = getattr(model.tokenizer, "bos_token_id", None)
    return (begin,) if begin is not None and model.tokenizer("a")["input_ids"][:1] == [begin] else ()


def _moved(tokens: tuple[int, ...], rng: random.Random) -> tuple[int, ...]:
    """The tokens in a random order in which none keeps its place (Sattolo's algorithm)."""
    moved = list(tokens)
    for i in range(len(moved) - 1, 0, -1):
        k = rng.randrange(i)
        moved[i], moved[k] = moved[k], moved[i]
    return tuple(moved)
