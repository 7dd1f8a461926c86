"""Positive and negative examples as a user gives them, and the hidden states at their positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from nnterp.inputs import Row

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer


def read_labels(labels: Any, count: int) -> list[bool]:
    """Two classes as booleans, from booleans, 0 and 1, or -1 and 1.

    Raises:
        TypeError: A label is something else than a boolean or an integer.
        ValueError: There is not one for each text, there are other numbers, or only one class.
    """
    listed = labels.tolist() if hasattr(labels, "tolist") else list(labels)
    found = []
    for label in listed:
        if not isinstance(label, bool) and not hasattr(label, "__index__") and label not in (0.0, 1.0):
            raise TypeError(f"A label is True or False (or 1 and 0, or 1 and -1), not {label!r}.")
        found.append(int(label))
    if len(found) != count:
        raise ValueError(f"There are {len(found)} labels for {count} texts; give one for each.")
    if set(found) not in ({0, 1}, {-1, 1}):
        raise ValueError(
            f"Labels are of two classes, True and False (or 1 and 0, or 1 and -1); these are {set(found)}."
        )
    return [label == 1 for label in found]


def split_pairs(given: Any) -> tuple[list[Any], list[Any]] | None:
    """The two sides of a list of pairs of prompts; None if it is something else."""
    if not isinstance(given, Sequence) or isinstance(given, str) or not given:
        return None
    for pair in given:
        if isinstance(pair, (str, Mapping)) or not isinstance(pair, Sequence) or len(pair) != 2:
            return None
        if not all(isinstance(side, str) or _is_chat(side) for side in pair):
            return None
    return [pair[0] for pair in given], [pair[1] for pair in given]


def _is_chat(prompt: Any) -> bool:
    return isinstance(prompt, Sequence) and not isinstance(prompt, str) and all(isinstance(m, Mapping) for m in prompt)


def states_at(
    model: StandardizedTransformer,
    prompts: Any,
    layers: Any,
    positions: Any,
    batch_size: int,
    progress: bool | None,
    remote: Any,
) -> tuple[dict[int, torch.Tensor], tuple[Row, ...]]:
    """The stream leaving layers, for each prompt the mean over its positions, and the prompts as rows.

    Returns:
        Layer → `[prompts, hidden]`, float64 on the CPU.
    """
    found = model.collect(
        prompts,
        "layers_output",
        layers,
        positions,
        batch_size=batch_size,
        reduce=None if hasattr(positions, "__index__") else mean_over_positions,
        progress=progress,
        remote=remote,
    )
    layers_read = [layer for layer in found.layers["layers_output"] if isinstance(layer, int)]
    states = {layer: found["layers_output", layer].double() for layer in layers_read}
    for layer, state in states.items():
        if state.dim() != 2:
            raise ValueError(
                f"The stream leaving layer {layer} of {model.model_class} has shape {list(state.shape[1:])} at a "
                "position, not [hidden], so it has no one direction."
            )
    return dict(sorted(states.items())), found.rows


def mean_over_positions(states: torch.Tensor) -> torch.Tensor:
    """`[rows, positions, hidden]` → `[rows, hidden]`, in single precision at least; `[rows, hidden]` stays."""
    wide = states.to(torch.promote_types(states.dtype, torch.float32))
    return wide.mean(1) if wide.dim() > 2 else wide
