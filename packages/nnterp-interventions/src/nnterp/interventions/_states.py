"""Values of whole runs, to be written into other runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import nnsight
import torch

from nnterp.inputs import Batch, Row, forward_flags, given, sharing_side
from nnterp.interventions._engine import POSITION_AXES, Key, Passing, Shortcuts, Step, axes_of, forward_steps, rows_of
from nnterp.interventions._running import BatchSize, filled, in_batches
from nnterp.values import get_label, get_value

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer

States: TypeAlias = dict[Key, torch.Tensor]


@torch.no_grad()
def states_of(
    model: StandardizedTransformer,
    prompts: Sequence[Row],
    keys: Sequence[Key],
    shortcuts: Shortcuts,
    remote: Any = False,
) -> tuple[list[States], torch.Tensor]:
    """Values of layers over all positions of each prompt, and the logits after it.

    Args:
        model: The model.
        prompts: The prompts; they share a forward pass, those of different lengths only with the `ragged` shortcut.
        keys: Names of values, with their layers.
        shortcuts: Those proven for the model; of them, `ragged` and `readout` are taken.
        remote: Run on the remote service; then pass `Shortcuts()`.

    Returns:
        For each prompt its values by name and layer, without the batch axis, on the model's device; and the logits at
        each prompt's last token, float32 `[prompts, vocab]`, on the CPU.
    """
    model.prepare(remote)
    steps = forward_steps(model, keys)
    found: list[States] = [{} for _ in prompts]
    logits: dict[int, torch.Tensor] = {}
    for chosen in sharing_groups(model, prompts, shortcuts):
        some = [prompts[i] for i in chosen]
        kept, last = _run(model, some, steps, shortcuts.readout, remote)
        width = max(len(prompt) for prompt in some)
        for k, i in enumerate(chosen):
            for (name, layer), tensor in zip((step.key for step in steps if step.term is None), kept, strict=True):
                own = own_part(tensor[k], name, len(prompts[i]), width)
                found[i][name, layer] = own if prompts[i].encoder is None else tensor[k]
            logits[i] = last[k]
    return found, torch.stack([logits[i] for i in range(len(prompts))])


def sharing_groups(model: StandardizedTransformer, prompts: Sequence[Row], shortcuts: Shortcuts) -> Iterable[list[int]]:
    """Indices of prompts by which of them may share a batch: of any lengths only with the `ragged` shortcut."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for i, prompt in enumerate(prompts):
        side: tuple[Any, ...] = sharing_side(model, prompt) if shortcuts.ragged else prompt.lengths
        if prompt.images is not None:
            side = (i, "image")
        groups.setdefault(side, []).append(i)
    return groups.values()


def _run(
    model: StandardizedTransformer, prompts: list[Row], steps: list[Step], readout: bool, remote: Any
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Read the values of one batch: `[prompts, ...]` each, and the logits at the last tokens, `[prompts, vocab]`."""
    ids, flags = filled(prompts), forward_flags(model)
    count, width = ids.shape
    place, at = torch.arange(count), torch.tensor([len(prompt) - 1 for prompt in prompts])
    inputs, heard = given(prompts, ids), prompts[0].encoder
    values = {name: get_value(name) for name in {step.key[0] for step in steps if step.term is None}}
    widths = {name: len(heard) if heard is not None and value.of_encoder else width for name, value in values.items()}
    with model.trace(inputs, remote=remote, **flags) as tracer:
        kept, passing = [], Passing(model)
        for step in steps:
            if step.term is not None:
                passing.hold(step)
                continue
            name = step.key[0]
            kept.append(rows_of(passing.read(step.key), count, widths[name], get_label(name)).clone())
        nnsight.save(kept)
        if readout:
            whole = passing.read(("layers_output", model.num_layers - 1))
            last = whole[place.to(whole.device), at.to(whole.device)].save()
            tracer.stop()
        else:
            whole = model.logits
            last = whole[place.to(whole.device), at.to(whole.device)].save()
    return kept, (model.project_on_vocab(last) if readout else last).float().cpu()


@torch.no_grad()
def last_states(
    model: StandardizedTransformer,
    prompts: Sequence[Row],
    layers: Sequence[int],
    name: str,
    remote: bool,
    batch_size: BatchSize,
    progress: bool | None,
) -> torch.Tensor:
    """A value of layers at each prompt's own last token, `[layers, prompts, hidden]`, on the last layer's device."""
    model.prepare(remote)
    flags, order = forward_flags(model), sorted(set(layers))
    kept: list[torch.Tensor | None] = [None] * len(prompts)

    def step(batch: Batch) -> None:
        count, last = torch.arange(len(batch)), batch.last
        with model.trace(batch.encoding, remote=remote, **flags) as tracer:
            states, passing = [], Passing(model)
            for layer in order:
                tensor = passing.read((name, layer))
                states.append(tensor[count.to(tensor.device), last.to(tensor.device)])
            stacked = torch.stack([state.to(states[-1].device) for state in states], dim=1).save()
            tracer.stop()
        for k, i in enumerate(batch.indices):
            kept[i] = stacked[k]

    in_batches(model, prompts, batch_size, step, "sources", progress)
    whole = torch.stack([state for state in kept if state is not None], dim=1)
    return whole[[order.index(layer) for layer in layers]]


def own_part(tensor: torch.Tensor, name: str, length: int, width: int) -> torch.Tensor:
    """One row of a value, cut to a prompt of `length` tokens in a batch filled up to `width` positions."""
    for axis, label in enumerate(axes_of(get_value(name))[1:]):
        if label in (*POSITION_AXES, "key") and tensor.shape[axis] == width:
            tensor = tensor.narrow(axis, 0, length)
    return tensor
