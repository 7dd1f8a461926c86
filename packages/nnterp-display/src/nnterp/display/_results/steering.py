"""Read effect and damage of a steering sweep from a result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nnterp.display._results.labelled import array_of, describe_tensors, require_result, score_name, title_of

UNITS = {"kl": "KL from the plain model (nats)", "repetition": "share of repeated bigrams", "length": "new tokens"}


@dataclass(frozen=True)
class SteeringPoints:
    """What `plot_steering` draws of a result.

    Attributes:
        effect, damage: `[layers, factors]`.
        plain: The damage without steering; None if the result does not say.
        layers, factors: Labels of the axes.
        effect_name, damage_name: Titles of the figure's axes.
        title: The figure's title.
    """

    effect: np.ndarray
    damage: np.ndarray
    plain: float | None
    layers: Sequence[Any]
    factors: Sequence[Any]
    effect_name: str
    damage_name: str
    title: str


def steering_points(given: Any, damage: str | None) -> SteeringPoints:
    """Effect and one measure of damage of each setting.

    Raises:
        TypeError: `given` is no result.
        ValueError: It has no effect by layer and factor, or not this measure of damage.
    """
    result = require_result(given, "plot_steering")
    shape = ("layers", "factors")
    measures = [name for name in result.tensors if tuple(result.axes[name]) == shape and name != "effect"]
    if "effect" not in result.tensors or tuple(result.axes["effect"]) != shape:
        raise ValueError(f"This result has no effect by layer and factor; it has {describe_tensors(result)}.")
    if not measures or damage not in (None, *measures):
        raise ValueError(f"damage={damage!r}: this result measured {', '.join(measures) or 'no damage'}.")
    name = measures[0] if damage is None else damage
    plain = result.tensors.get(f"plain_{name}", 0.0 if name == "kl" else None)
    return SteeringPoints(
        effect=array_of(result, "effect"),
        damage=array_of(result, name),
        plain=None if plain is None else float(plain),
        layers=result.labels["layers"],
        factors=result.labels["factors"],
        effect_name=f"change of {score_name(result, 'metric')}",
        damage_name=UNITS.get(name, name),
        title=title_of(result, "Steering: effect against damage"),
    )
