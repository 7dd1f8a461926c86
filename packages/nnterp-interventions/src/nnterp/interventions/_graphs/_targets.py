"""Which logits an attribution graph ends in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from nnterp.interventions._attribution import Targets
from nnterp.interventions._results import named_texts
from nnterp.interventions._tokens import token_id

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer


@dataclass(frozen=True)
class Logits:
    """The logit nodes of a graph.

    Attributes:
        targets: What each counts, as one prompt of `Targets`.
        labels: What each is of.
        probabilities: Of each, in the model's prediction; None for differences.
        weights: What each counts in influence, float32 `[logits]`.
    """

    targets: Targets
    labels: tuple[str, ...]
    probabilities: tuple[float | None, ...]
    weights: torch.Tensor


def logits_of(
    model: StandardizedTransformer, wanted: Any, logits: torch.Tensor, max_logits: int, probability: float
) -> Logits:
    """The logits that a graph ends in.

    Args:
        model: The model.
        wanted: What a user means by `targets`; see `attribution_graph`.
        logits: The model's own, at the last position, `[vocab]`.
        max_logits: If nothing is wanted, most tokens.
        probability: And the least that these have together.

    Raises:
        TypeError, ValueError: Something is no token.
    """
    chances = logits.double().softmax(-1).cpu()
    if wanted is None:
        top = chances.topk(min(max_logits, len(chances)))
        many = int(torch.searchsorted(top.values.cumsum(0), probability)) + 1
        sides: list[tuple[list[int], list[int] | None]] = [([i], None) for i in top.indices[:many].tolist()]
    else:
        entries = wanted if isinstance(wanted, list) else [wanted]
        if not entries:
            raise ValueError("targets is an empty list; give tokens, or None for the likeliest ones.")
        sides = [_sides(model, entry) for entry in entries]
    width = max(len(right) + len(wrong or ()) for right, wrong in sides)
    ids, weights = torch.zeros(len(sides), width, dtype=torch.long), torch.zeros(len(sides), width)
    labels, odds = list[str](), list[float | None]()
    for k, (right, wrong) in enumerate(sides):
        every = [*right, *(wrong or ())]
        ids[k, : len(every)] = torch.tensor(every)
        weights[k, : len(right)] = 1 / len(right)
        weights[k, len(right) : len(every)] = -1 / max(len(wrong or ()), 1)
        labels.append(" − ".join(_label(model, side) for side in (right, wrong) if side is not None))
        odds.append(float(chances[right].sum()) if wrong is None else None)
    twice = {own for own in labels if labels.count(own) > 1}
    labels = [f"{own} #{ids[k, 0]}" if own in twice else own for k, own in enumerate(labels)]
    if wanted is None:
        counted = torch.tensor([float(p or 0) for p in odds])
    else:
        counted = torch.full((len(sides),), 1 / len(sides))
    return Logits(Targets(ids, weights, ids[:, :1], None, True), tuple(labels), tuple(odds), counted)


def _sides(model: StandardizedTransformer, entry: Any) -> tuple[list[int], list[int] | None]:
    """The tokens whose logits are averaged, and those whose logits are subtracted."""
    if not isinstance(entry, tuple):
        return [token_id(model, entry)], None
    if len(entry) != 2:
        raise ValueError(
            f"targets has a tuple of {len(entry)}; a tuple is a difference (correct, wrong). Give a list for several "
            "logits."
        )
    right, wrong = ([token_id(model, t) for t in (side if isinstance(side, list) else [side])] for side in entry)
    if not right or not wrong:
        raise ValueError("targets has a difference with no token on one side.")
    return right, wrong


def _label(model: StandardizedTransformer, ids: list[int]) -> str:
    return " / ".join(named_texts(model, ids))
