"""What one forward pass of a batch leaves: values at the position that is read, of every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import nnsight
import torch

from nnterp.inputs import Batch, forward_flags
from nnterp.interventions._attribution._terms import Read
from nnterp.interventions._engine import Passing, forward_steps, rows_of
from nnterp.values import get_label

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer

PATTERN, KEYED = "attention_probabilities", "attention_values"


@dataclass(frozen=True)
class Reading:
    """One batch.

    Attributes:
        values: Value and layer → `[rows, ...]` at the position that is read: `[rows, hidden]` of streams and what is
            added to them, `[rows, heads, head_dim]`, `[rows, neurons]`; `[rows, heads, keys]` of patterns;
            `attention_values` at every position, `[rows, keys, kv_heads, head_dim]`.
        stream: The stream after the last layer, `[rows, hidden]`.
        logits: The model's own logits there, `[rows, vocab]`.
    """

    values: dict[Read, torch.Tensor]
    stream: torch.Tensor
    logits: torch.Tensor


@torch.no_grad()
def read_batch(model: StandardizedTransformer, batch: Batch, at: Sequence[int], reads: Sequence[Read]) -> Reading:
    """Run one batch and read values where each row is read.

    Args:
        model: The model.
        batch: The batch.
        at: For each row an index along the padded axis of positions.
        reads: Names of values, with their layers.
    """
    last = ("layers_output", model.num_layers - 1)
    steps = forward_steps(model, [*reads, last])
    count, width = batch.input_ids.shape
    rows, seq = torch.arange(count), torch.tensor(at)
    with model.trace(batch.encoding, **forward_flags(model)):
        kept, passing = {}, Passing(model)
        for step in steps:
            if step.term is not None:
                passing.hold(step)
                continue
            tensor = passing.read(step.key)
            kept[step.key] = _at(rows_of(tensor, count, width, get_label(step.key[0])), step.key[0], rows, seq)
        logits = model.logits
        found = nnsight.save((kept, logits[rows.to(logits.device), seq.to(logits.device)].clone()))
    values, own = found
    return Reading(values, values[last], own)


def _at(tensor: torch.Tensor, name: str, rows: torch.Tensor, seq: torch.Tensor) -> torch.Tensor:
    """A copy of a value at one position of each row; all keys of what has an axis of keys alone."""
    rows, seq = rows.to(tensor.device), seq.to(tensor.device)
    if name == KEYED:
        return tensor.clone()
    if name == PATTERN:
        return tensor[rows, :, seq].clone()
    return tensor[rows, seq].clone()
