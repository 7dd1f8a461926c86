"""The model's own predictions as values that `collect` reads: `logits` and `next_token_probs`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from nnterp.record import Record
from nnterp.table import Value
from nnterp.values import canonical

_DISTRIBUTION = "[batch, seq, vocab]"
LOGITS = Value("logits", _DISTRIBUTION, 7, "The model's logits.", per_layer=False)
NEXT = Value("next_token_probs", _DISTRIBUTION, 7, "Probabilities of the token after a prompt.", per_layer=False)
OUTPUTS = {value.name: value for value in (LOGITS, NEXT)}


class Predictions(Record):
    """The logits of the running forward pass, a place that is read after all others."""

    def read(self, model: Any, label: str) -> torch.Tensor:
        """`[batch, seq, vocab]`."""
        return model.logits

    def __str__(self) -> str:
        return "logits"


def only(given: Sequence[torch.Tensor]) -> torch.Tensor:
    """The one tensor that logits are made of."""
    return given[0]


def named(name: str) -> tuple[Value, int | None]:
    """The value a name stands for, and the layer if the name says one; as `canonical`, and the model's outputs too."""
    return (OUTPUTS[name], None) if name in OUTPUTS else canonical(name)
