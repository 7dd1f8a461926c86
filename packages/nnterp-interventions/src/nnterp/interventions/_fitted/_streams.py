"""The residual streams of a batch: with the graph that leads from one to a later one, or as numbers alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import nnsight
import torch

from nnterp.discovery import require_passes_with_gradients
from nnterp.errors import ShapeError, Unavailable
from nnterp.inputs import Batch, forward_flags
from nnterp.interventions._spots import states_at
from nnterp.values import gradient_reads, when

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer
    from nnterp.traced import Place


def require_one_stream(model: StandardizedTransformer, what: str) -> int:
    """The width of the model's stream.

    Raises:
        Unavailable: It has several streams, or its stream is not `[batch, seq, hidden]`.
    """
    layout, width = model.readout.layout, model.hidden_size
    if layout.batch != 0 or layout.width not in (None, width) or width is None:
        raise Unavailable(
            f"{what} maps a stream [batch, seq, hidden], and {model.model_class} has several streams side by side."
        )
    return width


def require_unsteered(model: StandardizedTransformer, what: str) -> None:
    """Raise inside `model.steering(...)`.

    Raises:
        ValueError: The model is steered.
    """
    if model.standing:
        raise ValueError(f"{what} fits a lens on the model as it is: call it outside of `with model.steering(...)`.")


@dataclass(frozen=True)
class Graph:
    """Streams of one forward pass, and the graph between them.

    Attributes:
        last: The stream to which the graph leads, `[batch, seq, hidden]`.
        read: The tensors of the model that the sources are made of.
        pulls: For each source, which of `read` it is made of, and the function that makes its gradient of theirs.
    """

    last: torch.Tensor
    read: list[torch.Tensor]
    pulls: list[tuple[list[int], Callable[[Sequence[torch.Tensor]], torch.Tensor]]]

    def pulled(self, cotangent: torch.Tensor, keep: bool) -> list[torch.Tensor]:
        """For each source, the vector-Jacobian product with a cotangent of the last, `[batch, seq, hidden]`."""
        grads = torch.autograd.grad(self.last, self.read, cotangent, retain_graph=keep, allow_unused=True)
        whole = [torch.zeros_like(r) if g is None else g for r, g in zip(self.read, grads, strict=True)]
        return [pull([whole[i] for i in indices]) for indices, pull in self.pulls]


def graph_of(model: StandardizedTransformer, inputs: dict[str, Any], layers: Sequence[int], last: int) -> Graph:
    """Run a batch up to layer `last`, with the graph from the streams leaving `layers`."""
    require_passes_with_gradients(model._module, model.anatomy)
    sources = [gradient_reads(model, model.place("layers_output", i), f"layers_output[{i}]") for i in layers]
    order: list[Place] = sorted({p for places, _ in sources for p in places}, key=lambda p: when(model, p))
    names, flags = [str(place) for place in order], forward_flags(model)
    with model.trace(inputs, **flags) as tracer:
        seen = []
        for place, name in zip(order, names, strict=True):
            tensor = place.read(model, name)
            if not tensor.requires_grad:
                tensor.requires_grad_(True)
            seen.append(tensor)
        found = nnsight.save((seen, model.layers_output[last]))
        tracer.stop()
    read, final = found
    if final.shape[:2] != inputs["input_ids"].shape:
        raise ShapeError(
            f"The residual stream of {model.model_class} has shape {list(final.shape)}, without the axes "
            f"{list(inputs['input_ids'].shape)} of the batch and its tokens."
        )
    pulls = [([order.index(place) for place in places], pull) for places, pull in sources]
    return Graph(final, read, pulls)


@torch.no_grad()
def states_of(
    model: StandardizedTransformer, batch: Batch, layers: Sequence[int], skip_first: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The streams at every position that counts: after `layers`, after the last layer, and whose row they are.

    Returns:
        `[spots, layers, hidden]`, `[spots, hidden]` and `[spots]`.
    """
    row = [r for r, own in enumerate(batch.rows) for _ in range(skip_first, len(own) - 1)]
    seq = [batch.starts[r] + p for r, own in enumerate(batch.rows) for p in range(skip_first, len(own) - 1)]
    rows, columns, last, shape = torch.tensor(row), torch.tensor(seq), model.num_layers - 1, batch.input_ids.shape
    order = sorted(layers)
    with model.trace(batch.encoding, **forward_flags(model)) as tracer:
        states = []
        for layer in order:
            states.append(states_at(model, model.layers_output[layer], rows, columns, shape))
        final = states_at(model, model.layers_output[last], rows, columns, shape)
        found = nnsight.save((torch.stack([state.to(final.device) for state in states], 1), final))
        tracer.stop()
    states, final = found
    return states[:, [order.index(layer) for layer in layers]], final, rows
