"""One forward pass with feed-forwards replaced; the graph of gradients that is left is attention, norms, the stream."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import nnsight
import torch
from torch import nn
from torch.autograd.graph import GradientEdge

from nnterp.frozen import FROZEN, prove_frozen, require_frozen
from nnterp.inputs import forward_flags
from nnterp.interventions._attribution import accumulated
from nnterp.interventions._engine import Key, rows_of
from nnterp.interventions._graphs._sites import Sites
from nnterp.values import get_label, reads

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer

# What takes the place of what a feed-forward returned: a function of the layer, what its transcoder reads and what the
# feed-forward returned, each `[rows, seq, ...]`; None leaves it as it is.
Put: TypeAlias = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor | None]


def held_kinds(model: StandardizedTransformer) -> tuple[str, ...]:
    """What is held still: patterns, norms, and gates where they can be (an attention's; feed-forwards are replaced).

    Raises:
        Unavailable: Patterns or the scales of norms cannot be held still in this model; says why.
    """
    require_frozen(model, ("patterns", "norms"))
    reasons = prove_frozen(model).reasons
    return tuple(kind for kind in FROZEN if kind not in reasons)


@dataclass
class Seen:
    """What a forward pass left, as `[rows, seq, ...]`.

    Attributes:
        values: Value and layer → its tensor.
        edges: Value and layer → where it stands in the graph of gradients, with the shape that the model keeps it in.
        logits: At the last position, `[rows, vocab]`, float32; None if they were not asked for.
    """

    values: dict[Key, torch.Tensor] = field(default_factory=dict)
    edges: dict[Key, tuple[GradientEdge, torch.Size, torch.dtype]] = field(default_factory=dict)
    logits: torch.Tensor | None = None


def run(
    model: StandardizedTransformer,
    sites: Sites,
    ids: torch.Tensor,
    put: Put,
    begin: Callable[[torch.Tensor], torch.Tensor] | None = None,
    logits: bool = True,
) -> Seen:
    """Run prompts of equal length with feed-forwards replaced.

    Args:
        model: The model.
        sites: Where to read and write.
        ids: Token ids, `[rows, seq]`.
        put: What takes the place of what each feed-forward returned.
        begin: What takes the place of the stream that enters the first layer; None to leave it.
        logits: Whether logits are wanted.
    """
    rows, seq = ids.shape
    combined = {}
    for key in (sites.entering, sites.leaving, *(key for own in sites.layers for key in (own.reads, own.writes))):
        combined[key] = reads(model, model.place(*key))
    last = {key: max(map(sites.places.index, places)) for key, (places, _) in combined.items()}
    due: dict[int, list[Key]] = {}
    for key, at in last.items():
        due.setdefault(at, []).append(key)
    writers = {own.writes: own for own in sites.layers}
    names = [str(place) for place in sites.places]
    seen, native = Seen(), dict[Any, torch.Tensor]()
    inputs = {"input_ids": ids, **forward_flags(model)}
    stop, gradients = model.readout.proven or not logits, torch.is_grad_enabled()

    def reached(key: Key) -> None:
        places, combine = combined[key]
        tensor = combine([native[place] for place in places])
        if key == sites.entering and begin is not None:
            new = begin(tensor)
            model.place(*key).write(model, new, key[0])
            tensor = new
        elif key in writers:
            own = writers[key]
            shown = rows_of(tensor, rows, seq, get_label(key[0]))
            new = put(own.layer, seen.values[own.reads], shown)
            if new is not None:
                model.place(*key).write(model, new.reshape(tensor.shape).to(tensor), key[0])
        if tensor.requires_grad:
            seen.edges[key] = (torch.autograd.graph.get_gradient_edge(tensor), tensor.shape, tensor.dtype)
        shown = rows_of(tensor, rows, seq, get_label(key[0]))
        seen.values[key] = shown if tensor.requires_grad else shown.clone()

    with torch.inference_mode(False), torch.set_grad_enabled(gradients), model.trace(inputs) as tracer:
        for at, (place, name) in enumerate(zip(sites.places, names, strict=True)):
            native[place] = place.read(model, name)
            for key in due.get(at, ()):
                reached(key)
        if stop:
            tracer.stop()
        else:
            seen.logits = nnsight.save(model.logits[:, -1].detach().float())
    if logits and stop:
        with torch.no_grad():
            seen.logits = model.project_on_vocab(seen.values[sites.leaving][:, -1:])[:, 0].float()
    return seen


@contextlib.contextmanager
def biases_apart(
    model: StandardizedTransformer, rows: int, seq: int
) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Zeros are added to what every module with a bias returns, so that each row's gradient of the bias is at hand.

    Feed-forwards are left out, because nothing flows through them.

    Yields:
        A list that gets (zeros `[rows, ..., channels]`, bias `[channels]`) at every call.
    """
    module = model._module
    inside = []
    for block in model.anatomy.blocks:
        if block.mlp is not None:
            inside += [path for path in (block.mlp.path, block.mlp.entry, block.mlp.exit) if path is not None]
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    handles = []

    def hook(bias: torch.Tensor, _: nn.Module, args: tuple, output: Any) -> Any:
        if not isinstance(output, torch.Tensor) or not torch.is_grad_enabled() or output.shape[-1] != bias.numel():
            return None
        flat = output.dim() == 2 and output.shape[0] == rows * seq  # OPT keeps rows and positions in one axis
        if not flat and (output.dim() < 3 or output.shape[0] != rows):
            return None
        zeros = output.new_zeros(rows, *(1,) * (1 if flat else output.dim() - 2), bias.numel()).requires_grad_(True)
        found.append((zeros, bias))
        return output + (zeros.expand(rows, seq, -1).reshape(output.shape) if flat else zeros)

    for path, inner in module.named_modules():
        bias = inner._parameters.get("bias")
        if bias is None or bias.dim() != 1 or any(path == p or path.startswith(f"{p}.") for p in inside):
            continue
        handles.append(inner.register_forward_hook(partial(hook, bias)))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def bias_shares(found: list[tuple[torch.Tensor, torch.Tensor]], slopes: list[torch.Tensor | None]) -> torch.Tensor:
    """What biases add, by row: their gradients times themselves, `[rows]`, float32."""
    total: torch.Tensor | None = None
    for (_, bias), slope in zip(found, slopes, strict=True):
        if slope is not None:
            own = (accumulated(slope).flatten(1) @ accumulated(bias.detach()).to(slope.device)).cpu()
            total = own if total is None else total + own
    return torch.zeros(()) if total is None else total
