"""Values of whole runs, to be put into other runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import nnsight
import torch

from nnterp.inputs import Row
from nnterp.interventions._edits import POSITION_AXES, axes_of, rows_of
from nnterp.interventions._passing import Passing, forward_steps
from nnterp.interventions._running import filled, forward_flags
from nnterp.interventions._shortcuts import Shortcuts, prove
from nnterp.values import get_label, get_value

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer

States = dict[tuple[str, int], torch.Tensor]


@torch.no_grad()
def states_of(
    model: StandardizedTransformer, rows: Sequence[Row], keys: Sequence[tuple[str, int]], remote: Any = False
) -> tuple[list[States], torch.Tensor]:
    """Values of layers over all positions of each prompt, and the logits after it.

    Args:
        model: The model.
        rows: The prompts; they share a forward pass, where they are of different lengths only if that is proven exact.
        keys: Names of values, with their layers.
        remote: Run on the remote service.

    Returns:
        For each prompt the values by name and layer, without the batch, where the model computes them; and the logits
        at each prompt's last token, float32 `[prompts, vocab]`, on the CPU.
    """
    model.prepare(remote)
    taken = Shortcuts() if remote else prove(model)
    readout = taken.readout
    flags, steps = forward_flags(model), forward_steps(model, keys)
    order = [step.key for step in steps if step.term is None]
    found: list[States] = [{} for _ in rows]
    logits: dict[int, torch.Tensor] = {}
    groups: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(0 if taken.ragged else len(row), []).append(i)
    for chosen in groups.values():
        ids = filled([rows[i] for i in chosen])
        count, width = ids.shape
        place, at = torch.arange(count), torch.tensor([len(rows[i]) - 1 for i in chosen])
        with model.trace({"input_ids": ids}, remote=remote, **flags) as tracer:
            kept, passing = [], Passing(model)
            for step in steps:
                if step.term is not None:
                    passing.hold(step)
                    continue
                kept.append(rows_of(passing.read(step.key), count, width, get_label(step.key[0])).clone())
            nnsight.save(kept)
            if readout:
                whole = passing.read(("layers_output", model.num_layers - 1))
                last = whole[place.to(whole.device), at.to(whole.device)].save()
                tracer.stop()
            else:
                whole = model.logits
                last = whole[place.to(whole.device), at.to(whole.device)].save()
        last = (model.project_on_vocab(last) if readout else last).float().cpu()
        for k, i in enumerate(chosen):
            for (name, layer), tensor in zip(order, kept, strict=True):
                assert layer is not None
                found[i][name, layer] = own_part(tensor[k], name, len(rows[i]), width)
            logits[i] = last[k]
    return found, torch.stack([logits[i] for i in range(len(rows))])


def own_part(tensor: torch.Tensor, name: str, length: int, width: int) -> torch.Tensor:
    """What of one row of a value, in a batch filled up to `width` positions, belongs to a prompt of `length`."""
    for axis, label in enumerate(axes_of(get_value(name))[1:]):
        if label in (*POSITION_AXES, "key") and tensor.shape[axis] == width:
            tensor = tensor.narrow(axis, 0, length)
    return tensor
