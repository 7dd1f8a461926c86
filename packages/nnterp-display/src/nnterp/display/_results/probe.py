"""Read accuracies of a probe, and of its null controls, from a result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nnterp.display._results.labelled import array_of, describe_tensors, require_result, title_of

CONTROLS = {"shuffled": "shuffled labels", "random": "random directions"}


@dataclass(frozen=True)
class Accuracies:
    """What `plot_probe` draws of a result.

    Attributes:
        accuracy: Held-out accuracy, `[layers]`.
        folds: The same in each fold, `[layers, folds]`; None if the result does not say.
        controls: The accuracies of each null control, `[layers, repeats]`, by what it is.
        majority: The share of the larger class; None if the result does not say.
        layers: Labels of the layers.
        title: The figure's title.
    """

    accuracy: np.ndarray
    folds: np.ndarray | None
    controls: Mapping[str, np.ndarray]
    majority: float | None
    layers: Sequence[Any]
    title: str


def accuracies(given: Any) -> Accuracies:
    """The accuracies of a probe's result.

    Raises:
        TypeError: `given` is no result.
        ValueError: It has no accuracy by layer.
    """
    result = require_result(given, "plot_probe")
    if "accuracy" not in result.tensors or tuple(result.axes["accuracy"]) != ("layers",):
        raise ValueError(f"This result has no accuracy by layer; it has {describe_tensors(result)}.")
    there = result.tensors
    return Accuracies(
        accuracy=array_of(result, "accuracy"),
        folds=array_of(result, "fold_accuracy") if "fold_accuracy" in there else None,
        controls={words: array_of(result, name) for name, words in CONTROLS.items() if name in there},
        majority=float(there["majority"]) if "majority" in there else None,
        layers=result.labels["layers"],
        title=title_of(result, "Probe: held-out accuracy by layer"),
    )
