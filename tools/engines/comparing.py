"""The comparison, the same for every engine: what it gave, against the reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from cells import TOLERANCE

AGREES, REFUSED, WRONG, ABSENT, NONE = "agrees", "refused", "wrong", "not offered", "no reference"
LETTERS = {AGREES: "=", REFUSED: "r", WRONG: "x", ABSENT: "-", NONE: "."}

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Outcome:
    """What came of one cell: its kind; the text of the refusal, or how wrong the number is."""

    kind: str
    detail: str = ""


def distance(value: torch.Tensor, reference: torch.Tensor) -> float | str:
    """The largest difference, relative to the reference's largest number; or that the shapes differ."""
    value, reference = value.squeeze(), reference.squeeze()
    if value.shape != reference.shape:
        return f"shape {list(value.shape)} instead of {list(reference.shape)}"
    found = float((value - reference).abs().max() / reference.abs().max())
    return found if found == found else "not a number"


def nearest(value: torch.Tensor, key: str, reference: Tensors) -> float | str:
    """The distance from the nearest of the tensors that are accepted for a key."""
    found = [distance(value, tensor) for name, tensor in reference.items() if name.rpartition("@")[0] == key]
    numbers = [one for one in found if isinstance(one, float)]
    return min(numbers) if numbers else found[0]


def outcome(
    cell: str, places: Sequence[int | str], reference: Tensors, given: Tensors, errors: Mapping[str, str]
) -> Outcome:
    """What came of one cell. One number that differs makes it wrong, one that is missing makes it refused.

    Args:
        cell: Its name.
        places: The layers, or "logits", for which there is a reference.
        reference: Named `CELL.PLACE@N`, where N counts the tensors that are accepted.
        given: What the engine gave, named `CELL.PLACE`.
        errors: What the engine said where it gave nothing, by the same names; "load" if it did not load the model.
    """
    if not places:
        return Outcome(NONE)
    keys = [f"{cell}.{place}" for place in places]
    distances = {key: nearest(given[key], key, reference) for key in keys if key in given}
    differing = {key: one for key, one in distances.items() if isinstance(one, str) or one > TOLERANCE}
    if differing:
        where = ", ".join(key.removeprefix(f"{cell}.") for key in differing)
        worst = next((one for one in differing.values() if isinstance(one, str)), None)
        worst = worst or f"off by {max(one for one in differing.values()):.2g}"
        return Outcome(WRONG, f"{worst} at {where}")
    refusals = [errors.get(key, errors.get("load")) for key in keys if key not in given]
    said = [text for text in refusals if text is not None]
    if said:
        return Outcome(REFUSED, said[0])
    return Outcome(ABSENT) if refusals else Outcome(AGREES)


def outcomes(
    facts: Mapping,
    reference: Tensors,
    given: Tensors,
    errors: Mapping[str, str],
    offered: Sequence[str],
    cells: Sequence[str],
) -> dict[str, Outcome]:
    """What came of all cells of a model type; those that the engine has no call for are not offered."""
    found = {}
    for cell in cells:
        places = facts["cells"].get(cell, ())
        if places and cell not in offered:
            found[cell] = Outcome(ABSENT)
        else:
            found[cell] = outcome(cell, places, reference, given, errors)
    return found
