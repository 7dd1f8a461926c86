"""The model's own predictions as values that `collect` reads: `logits` and `next_token_probs`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch

from nnterp.record import Record
from nnterp.table import Value, get_value
from nnterp.values import canonical

_DISTRIBUTION = "[batch, seq, vocab]"
LOGITS = Value("logits", _DISTRIBUTION, 7, "The model's logits.", per_layer=False)
NEXT = Value("next_token_probs", _DISTRIBUTION, 7, "Probabilities of the token after a prompt.", per_layer=False)
Index: TypeAlias = int | tuple[int, int]  # a layer, or a layer and the number of a dictionary in it
OUTPUTS = {value.name: value for value in (LOGITS, NEXT)}


class Predictions(Record):
    """The logits of the running forward pass, a place that is read after all others."""

    def read(self, model: Any, label: str) -> torch.Tensor:
        """`[batch, seq, vocab]`."""
        return model.logits

    def __str__(self) -> str:
        return "logits"


def only(given: Sequence[torch.Tensor]) -> torch.Tensor:
    """Pick the one tensor that logits are made of; returns it as it is, dtype and device included."""
    return given[0]


def named(name: str, outputs: bool = True) -> tuple[Value, Index | None]:
    """The value a name stands for, and the layer if the name says one.

    As `canonical`; also "features[3, 1]", one of several dictionaries of a layer, "layers_output[3, 1]", one pass of a
    layer of a looped model, and the model's outputs.

    Args:
        name: The name.
        outputs: Whether "logits" and "next_token_probs" are names.

    Returns:
        The row of the table, and the layer if the name says one, else None.
    """
    numbered = re.fullmatch(r"(\w+)\[\s*(-?\d+)\s*,\s*(-?\d+)\s*\]", name) if isinstance(name, str) else None
    if numbered is not None:
        return get_value(numbered[1]), (int(numbered[2]), int(numbered[3]))
    return (OUTPUTS[name], None) if outputs and name in OUTPUTS else canonical(name)


def label_of(name: str, layer: Index | None) -> str:
    """How errors call a value of a layer: "layers_output[3]", "features[3, 1]"."""
    if layer is None:
        return name
    return f"{name}[{', '.join(map(str, layer if isinstance(layer, tuple) else (layer,)))}]"
