"""Values of prompts' runs, and the gradient of each prompt's metric with respect to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import nnsight
import torch
from torch.autograd.graph import GradientEdge

from nnterp.collection import GradientReads, gradients_at, note
from nnterp.inputs import Row, forward_flags
from nnterp.interventions._attribution._dropped import Gates
from nnterp.interventions._engine import Key, Passing, Shortcuts, rows_of
from nnterp.interventions._running import filled, weights_at_rest
from nnterp.interventions._states import States, own_part, sharing_groups
from nnterp.values import get_label

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer

EMBEDDINGS: Key = ("token_embeddings", None)

# From float32 logits [n, vocab] that require a gradient, and the indices of their prompts, to one number each, [n].
RowMetric: TypeAlias = Callable[[torch.Tensor, list[int]], torch.Tensor]


@dataclass(frozen=True)
class Slopes:
    """One prompt's run: values, and the gradient of the prompt's metric with respect to them.

    Attributes:
        values, gradients: By name and layer, over the prompt's own tokens, without the batch axis, in the model's dtype
            and on its device. They are views of what the whole batch made: keep numbers made of them, not them.
        score: The metric, a float32 scalar on the CPU.
        logits: Next-token logits, float32 `[vocab]`, on the model's device.
    """

    values: States
    gradients: States
    score: torch.Tensor
    logits: torch.Tensor


@dataclass(frozen=True)
class _Run:
    """A forward pass of prompts in one batch, before its gradients.

    Attributes:
        width: Positions of the batch.
        edges, kept: What was read at the places of the plan.
        scores: The metric of each prompt, in the graph.
        logits: Next-token logits, float32 `[prompts, vocab]`.
    """

    model: StandardizedTransformer
    plan: GradientReads
    prompts: list[Row]
    width: int
    edges: list[GradientEdge | None]
    kept: list[torch.Tensor]
    scores: torch.Tensor
    logits: torch.Tensor

    def slopes(self, again: bool = False) -> list[Slopes]:
        """One backward pass; the graph stays for another if `again`."""
        plan = self.plan
        made = gradients_at(self.scores.sum(), self.edges, self.kept, plan.wanted, plan.names, again)
        values, slopes = plan.combined(self.kept, made)
        shown = (self.split(values), self.split(slopes), self.scores.detach().float().cpu(), self.logits.detach())
        return [Slopes(*one) for one in zip(*shown, strict=True)]

    def split(self, tensors: States) -> list[States]:
        """Values of the batch as those of each prompt alone."""
        size = (len(self.prompts), self.width)
        rows = {key: _by_row(self.model, key[0], tensor, size) for key, tensor in tensors.items()}
        return [
            {key: own_part(tensor[i], key[0], len(prompt), self.width) for key, tensor in rows.items()}
            for i, prompt in enumerate(self.prompts)
        ]


def slopes_of(
    model: StandardizedTransformer,
    prompts: Sequence[Row],
    keys: Sequence[Key],
    metric: RowMetric,
    shortcuts: Shortcuts,
    *,
    wrt: Sequence[Key] | None = None,
    embeddings: Sequence[torch.Tensor] | None = None,
) -> list[Slopes]:
    """Values of each prompt's run, and the gradient of each prompt's metric, in one forward and one backward pass.

    Prompts share a batch where each gives in it what it gives alone; the sum of their metrics has each one's gradient
    with respect to each one's values. The weights take no part: their `.grad` stays as it is.

    Args:
        model: The model.
        prompts: The prompts of one batch.
        keys: Names and layers of the values to return.
        metric: From next-token logits, and the indices of their prompts, to one number for each.
        shortcuts: Those proven for the model; of them, `ragged` and `readout` are taken.
        wrt: The values to differentiate by; `keys` if None.
        embeddings: For each prompt, token embeddings `[seq, hidden]` to run it with instead of its tokens' own.

    Returns:
        For each prompt its `Slopes`.

    Raises:
        RuntimeError: Gradients are switched off.
        ValueError: The metric is not differentiable.
        Unavailable: The model does not have a value, or no gradient with respect to it can be had.
    """
    require_gradients_on("slopes_of()")
    plan = GradientReads(model, keys, wrt)
    found: list[Slopes | None] = [None] * len(prompts)
    with weights_at_rest(model._module):
        for chosen in sharing_groups(model, prompts, shortcuts):
            own = None if embeddings is None else [embeddings[i] for i in chosen]
            made = _run(model, plan, [prompts[i] for i in chosen], own, chosen, metric, shortcuts.readout).slopes()
            for i, slopes in zip(chosen, made, strict=True):
                found[i] = slopes
    return [slopes for slopes in found if slopes is not None]


def slopes_without(
    model: StandardizedTransformer,
    prompts: Sequence[Row],
    keys: Sequence[Key],
    metric: RowMetric,
    shortcuts: Shortcuts,
    gates: Gates,
    each: Callable[[list[int], int, list[Slopes]], None],
    *,
    wrt: Sequence[Key],
) -> None:
    """`slopes_of` without the gradient through one layer's contribution, for one layer after the other.

    Costs one forward pass, and a backward pass for each layer. Arguments and errors as `slopes_of`, and:

    Args:
        gates: The layers.
        each: Called with the indices of prompts that share a batch, the layer that is left out, and their `Slopes`.
    """
    require_gradients_on("slopes_without()")
    plan = GradientReads(model, [*keys, *gates.keys], wrt)
    with weights_at_rest(model._module):
        for chosen in sharing_groups(model, prompts, shortcuts):
            rows = [prompts[i] for i in chosen]
            ran = _run(model, plan, rows, None, chosen, metric, shortcuts.readout, gates)
            for layer in gates.layers:
                gates.dropped = layer
                each(chosen, layer, ran.slopes(again=layer != gates.layers[-1]))


def require_gradients_on(who: str) -> None:
    """Raise where torch computes no gradients.

    Raises:
        RuntimeError: It was called under `torch.no_grad()` or `torch.inference_mode()`.
    """
    if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"{who} was called under torch.no_grad() or inference_mode, where nothing has a gradient. Call it outside."
        )


def _run(
    model: StandardizedTransformer,
    plan: GradientReads,
    prompts: list[Row],
    embeddings: list[torch.Tensor] | None,
    indices: list[int],
    metric: RowMetric,
    readout: bool,
    gates: Gates | None = None,
) -> _Run:
    ids, flags, places, names = filled(prompts), forward_flags(model), plan.places, plan.names
    count, width = ids.shape
    row, at = torch.arange(count), torch.tensor([len(prompt) - 1 for prompt in prompts])
    own = None if embeddings is None else _filled_up(embeddings, width)
    begin, leaving = model.place(*EMBEDDINGS), model.num_layers - 1
    with model.trace({"input_ids": ids}, **flags) as tracer:
        start = begin.read(model, EMBEDDINGS[0])
        given = start if own is None else own.to(start).view(start.shape)
        begin.write(model, given.detach().requires_grad_(True).clone(), EMBEDDINGS[0])  # a model may edit it in place
        edges: list[GradientEdge | None] = []
        kept: list[torch.Tensor] = []
        for place, name in zip(places, names, strict=True):
            tensor = place.read(model, name)
            if not tensor.requires_grad and tensor.is_floating_point():
                tensor.requires_grad_(True)  # it depends on nothing that is differentiated: the graph begins here
            note(tensor if gates is None else gates.passed(model, place, name, tensor), edges, kept)
        nnsight.save(edges)
        nnsight.save(kept)
        if readout:
            whole = Passing(model).read(("layers_output", leaving))
            last = whole[row.to(whole.device), at.to(whole.device)].save()
            tracer.stop()
        else:
            whole = model.logits
            last = whole[row.to(whole.device), at.to(whole.device)].save()
    logits = (model.project_on_vocab(last) if readout else last).float()
    return _Run(model, plan, prompts, width, edges, kept, metric(logits, indices), logits)


def _filled_up(embeddings: list[torch.Tensor], width: int) -> torch.Tensor:
    """Embeddings `[prompts, seq, ...]`; shorter prompts repeat their last token's on the right."""
    return torch.stack([torch.cat([own, own[-1:].expand(width - len(own), *own.shape[1:])]) for own in embeddings])


def _by_row(model: StandardizedTransformer, name: str, tensor: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """A value with the batch first: `[rows, seq, ...]`; several streams are `[rows, seq, streams, hidden]`."""
    if Passing(model).streams_first(name):
        tensor = tensor.movedim(0, 2)
    return rows_of(tensor, *size, get_label(name))
