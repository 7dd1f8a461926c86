"""Measures of what a steering breaks: divergence on neutral prompts, perplexity, repetition, length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from nnterp.inputs import Row, encode

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer

NAMES = ("kl", "perplexity", "repetition", "length")
GENERATED = ("repetition", "length")
NEUTRAL = (
    "The train to the coast leaves at nine and arrives before noon.",
    "Water boils at a lower temperature in the mountains.",
    "She put the book on the table and opened the window.",
    "The committee will meet again on the first Monday of the month.",
    "A square has four sides of the same length.",
    "He parked the car behind the house and walked to the station.",
    "The museum keeps its older maps in the basement.",
    "To open the file, choose its name from the list.",
)


def read_damage(model: StandardizedTransformer, damage: Any, prompts: list[Row]) -> dict[str, list[Row]]:
    """The measures asked for, each with the prompts or texts that it is taken on.

    Raises:
        ValueError: There is no such measure, or a text of the perplexity has a single token.
    """
    if damage is None:
        return {}
    given: Mapping[str, Any]
    if isinstance(damage, Mapping):
        given = damage
    else:
        given = dict.fromkeys([damage] if isinstance(damage, str) else list(damage))
    unknown = [name for name in given if name not in NAMES]
    if unknown:
        raise ValueError(f"damage={unknown[0]!r} is not one of {', '.join(NAMES)}.")
    found = {}
    for name, texts in given.items():
        own = (
            (prompts if name in GENERATED else encode(model, list(NEUTRAL))) if texts is None else encode(model, texts)
        )
        if name == "perplexity" and min(map(len, own)) < 2:
            raise ValueError("A text of one token has no perplexity: nothing in it is predicted.")
        found[name] = own
    if len({tuple(row.ids for row in found[name]) for name in GENERATED if name in found}) > 1:
        raise ValueError("Repetition and length are measured on one generation: give both the same prompts.")
    return found


def read_rows(logits: torch.Tensor, wanted: Sequence[tuple[str, int, int, Any]]) -> list[torch.Tensor]:
    """What is measured of each row of a batch that is padded on the left, inside the trace.

    Args:
        logits: `[rows, seq, vocab]`.
        wanted: For each measure: its kind, the row, the number of its own tokens, and what is compared with.

    Returns:
        "last": the logits after the row, float32 `[vocab]`. "plain": the log-probabilities at all its positions,
        `[tokens, vocab]`. "kl": the divergence from such, summed over positions. "nll": minus the log-probability of
        the row's ids, summed over all but the first.
    """
    found = []
    for kind, row, length, given in wanted:
        own = logits[row, -length:].float()
        if kind == "last":
            made = own[-1].clone()
        elif kind == "plain":
            made = own.log_softmax(-1)
        elif kind == "kl":
            plain, logs = given.to(own.device), own.log_softmax(-1)
            made = torch.where(plain > -torch.inf, plain.exp() * (plain - logs), 0.0).sum().clamp(min=0)
        else:
            ids = given.to(own.device)
            made = -own[:-1].log_softmax(-1).gather(-1, ids[1:, None]).sum()
        found.append(made.detach())
    return found


def repetition(tokens: Sequence[Sequence[int]], n: int = 2) -> float:
    """The share of n-grams that occurred before in the same text: 1 − distinct-n (Li et al., 2016), over all texts.

    NaN if no text has n tokens.
    """
    total = different = 0
    for text in tokens:
        grams = [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]
        total, different = total + len(grams), different + len(set(grams))
    return 1 - different / total if total else float("nan")


def own_tokens(made: torch.Tensor, ends: set[int]) -> list[list[int]]:
    """The new tokens of each row, `[rows, tokens]`, up to its end token and without it."""
    rows = made.tolist()
    return [row[: next((k for k, token in enumerate(row) if token in ends), len(row))] for row in rows]
