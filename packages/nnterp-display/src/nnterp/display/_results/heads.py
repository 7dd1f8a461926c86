"""Read the scores of heads and of their null control from a result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nnterp.display._results.labelled import arguments, array_of, describe_tensors, require_result, title_of

AXES = ("layers", "heads")


@dataclass(frozen=True)
class Heads:
    """What `plot_heads` draws of a result.

    Attributes:
        scores: `[layers, heads]`.
        control, control_std: Mean and standard deviation of the control, in the same shape; None without a control.
        layers, heads: Labels of the axes.
        score: What the scores are.
        title: The figure's title.
    """

    scores: np.ndarray
    control: np.ndarray | None
    control_std: np.ndarray | None
    layers: Sequence[Any] | None
    heads: Sequence[Any] | None
    score: str
    title: str | None


def head_scores(given: Any, tensor: str | None) -> Heads:
    """A tensor of the result over layers and heads, "scores" if None; the control belongs to the scores.

    Raises:
        TypeError: `given` is no result.
        ValueError: It has no such tensor over layers and heads.
    """
    result = require_result(given, "plot_heads")
    name = "scores" if tensor is None else tensor
    if name not in result.tensors or tuple(result.axes[name]) != AXES:
        raise ValueError(
            f"This result has no tensor {name!r} over layers and heads; it has {describe_tensors(result)}."
        )
    kind = str(arguments(result).get("kind", "")).replace("_", " ")
    control = name == "scores" and {"control", "control_std"} <= set(result.tensors)
    return Heads(
        scores=array_of(result, name),
        control=array_of(result, "control") if control else None,
        control_std=array_of(result, "control_std") if control else None,
        layers=result.labels["layers"],
        heads=result.labels["heads"],
        score=f"{kind} score" if kind and name == "scores" else name.replace("_", " "),
        title=title_of(result, f"{kind.capitalize() or 'Scores of'} heads"),
    )
