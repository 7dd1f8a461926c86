"""Values of whole runs, to be put into other runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import nnsight
import torch

from nnterp.inputs import Row
from nnterp.interventions._edits import rows_of
from nnterp.interventions._passing import Passing, forward_steps
from nnterp.interventions._running import forward_flags
from nnterp.values import get_value

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer

States = dict[tuple[str, int], torch.Tensor]


@torch.no_grad()
def states_of(
    model: StandardizedTransformer, rows: Sequence[Row], keys: Sequence[tuple[str, int]]
) -> tuple[list[States], torch.Tensor]:
    """Values of layers over all positions of each prompt, and the logits after it.

    Args:
        model: The model.
        rows: The prompts; those of one length share a forward pass.
        keys: Names of values, with their layers.

    Returns:
        For each prompt the values by name and layer, without the batch, where the model computes them; and the logits
        at each prompt's last token, float32 `[prompts, vocab]`, on the CPU.
    """
    model.dispatch()
    flags, steps = forward_flags(model), forward_steps(model, keys)
    order = [step.key for step in steps if step.term is None]
    found: list[States] = [{} for _ in rows]
    logits: dict[int, torch.Tensor] = {}
    lengths: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        lengths.setdefault(len(row), []).append(i)
    for length, chosen in lengths.items():
        ids = torch.tensor([rows[i].ids for i in chosen])
        with model.trace({"input_ids": ids}, **flags):
            kept, passing = [], Passing(model)
            for step in steps:
                if step.term is not None:
                    passing.hold(step)
                    continue
                kept.append(rows_of(passing.read(step.key), len(chosen), length, get_value(step.key[0])).clone())
            nnsight.save(kept)
            last = model.logits[:, -1].float().cpu().save()
        for k, i in enumerate(chosen):
            found[i] = {(name, layer): tensor[k] for (name, layer), tensor in zip(order, kept, strict=True)}  # type: ignore[misc]
            logits[i] = last[k]
    return found, torch.stack([logits[i] for i in range(len(rows))])
