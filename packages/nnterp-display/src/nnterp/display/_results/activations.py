"""Read values by position and unit from a result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nnterp.display._results.labelled import input_names, main_tensor, require_result, title_of
from nnterp.display._results.picking import at_prompt, pick


@dataclass(frozen=True)
class UnitValues:
    """What `plot_activations` draws: tokens, values `[positions, units]`, labels and kind of the units, a title."""

    tokens: list[str]
    values: np.ndarray
    units: Sequence[Any]
    kind: str
    title: str


def unit_values(given: Any, prompt: int | None = None) -> UnitValues:
    """The result's main tensor over the positions of one prompt and one further axis.

    Raises:
        TypeError: `given` is no result.
        ValueError: It has no tokens, or not one further axis; or several prompts and none was chosen.
        IndexError: There is no such prompt.
    """
    result = require_result(given, "plot_activations")
    name = main_tensor(result)
    others = [axis for axis in result.axes[name] if axis not in ("prompts", "positions")]
    if "positions" not in result.axes[name] or len(others) != 1:
        raise ValueError(
            f"{name} has axes {', '.join(result.axes[name])}; activations over a text need positions and one further "
            "axis."
        )
    picked = pick(result, name, at_prompt(prompt), "positions", others[0])
    tokens = input_names(result, picked.taken.get("prompts", 0), None)
    if tokens is None:
        raise ValueError("This result does not carry its tokens; give plot_activations(tokens, values).")
    kept = [i for i, token in enumerate(tokens) if token]
    return UnitValues(
        [tokens[i] for i in kept],
        picked.array[kept],
        list(result.labels[others[0]]),
        others[0].removesuffix("s"),
        title_of(result, f"{name.capitalize()} over the text"),
    )
