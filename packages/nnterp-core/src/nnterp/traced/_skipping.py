"""Leave layers out of the running forward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from nnterp.errors import ShapeError, Unavailable
from nnterp.traced._accessors import layer_index, require_running

if TYPE_CHECKING:
    from nnterp.traced._running import Rest, Running


def skip_layers(
    model: Running, start: int, end: int, skip_with: torch.Tensor | None, returns: tuple[Rest, ...]
) -> None:
    """Make layers `start` to `end` return `skip_with`, or what enters `start`."""
    first = layer_index(start, model.num_layers, "skip_layers(start_layer)")
    last = layer_index(end, model.num_layers, "skip_layers(end_layer)")
    if last < first:
        raise ValueError(f"skip_layers({start}, {end}): the last layer to skip comes before the first.")
    require_running(model, "skip_layers()")
    entering = model.layers_input[first]
    stream = entering if skip_with is None else skip_with
    if stream.shape != entering.shape:
        raise ShapeError(
            f"skip_with has shape {list(stream.shape)}; the residual stream entering layer {first} has shape "
            f"{list(entering.shape)}."
        )
    stream = stream.to(device=entering.device, dtype=entering.dtype)
    require_skippable(model, range(first, last + 1))
    batcher = model.interleaver.batcher
    if model.readout.layout.sequence_first and batcher is not None and batcher.batching:
        raise Unavailable(
            f"{model.model_class} stores its stream as [seq, batch, hidden], so layers cannot be skipped in "
            "several invokes of one trace: put the prompts into one invoke, or into traces of their own."
        )
    stream = model.readout.layout.native(stream)
    for layer in range(first, last + 1):
        envoy = model.envoy(model.layer_paths[layer])
        rest = returns[layer]
        args, kwargs = envoy.inputs if rest is not None else ((), {})
        envoy.skip(skipped_output(stream, rest, args, kwargs))


def require_skippable(model: Running, layers: range) -> None:
    """Raise for layers that later ones borrow from: their keys and values, or the keys they picked.

    Raises:
        Unavailable: Such a layer would be skipped while one that borrows from it still runs.
    """
    for source, borrowers, what in model.lenders:
        running = [i for i in borrowers if i not in layers]
        if source in layers and running:
            raise Unavailable(
                f"Layer {source} of {model.model_class} cannot be skipped alone: layers {running} use {what}. "
                f"Skip these too, or set layers_output[{source}] to what should leave it."
            )


def skipped_output(stream: torch.Tensor, rest: Rest, args: tuple, kwargs: dict[str, Any]) -> Any:
    """What a skipped layer returns: the stream, and its other outputs taken unchanged from its arguments."""
    if rest is None:
        return stream
    through = (args[key] if isinstance(key, int) else kwargs.get(key) if key is not None else None for key in rest)
    return (stream, *through)
