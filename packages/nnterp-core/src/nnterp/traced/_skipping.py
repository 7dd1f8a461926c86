"""Leave layers out of the running forward pass."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch

from nnterp.errors import ShapeError, Unavailable
from nnterp.traced._accessors import layer_index, require_running
from nnterp.traced._places import Site
from nnterp.traced._steps import in_steps

if TYPE_CHECKING:
    from nnterp.traced._running import Rest, Running


def skip_layers(
    model: Running,
    start: int,
    end: int,
    skip_with: torch.Tensor | None,
    returns: tuple[Rest, ...],
    steps: Any = None,
) -> None:
    """Make layers `start` to `end` return `skip_with`, or what enters `start`, in the steps chosen.

    In a generation the layers do run, because later steps read their keys and values from the cache; what leaves the
    last of them is replaced. ValueError: `end` is before `start`.
    """
    first = layer_index(start, model.num_layers, "skip_layers(start_layer)")
    last = layer_index(end, model.num_layers, "skip_layers(end_layer)")
    if last < first:
        raise ValueError(f"skip_layers({start}, {end}): the last layer to skip comes before the first.")
    require_running(model, "skip_layers()")

    require_skippable(model, range(first, last + 1))

    def leave_out(step: int) -> None:
        entering = model.layers_input[first]
        stream = entering if skip_with is None else skip_with
        if stream.shape != entering.shape:
            raise ShapeError(
                f"skip_with has shape {list(stream.shape)}; the residual stream entering layer {first} has shape "
                f"{list(entering.shape)}."
            )
        stream = stream.to(device=entering.device, dtype=entering.dtype)
        if model.interleaver.stepping:
            pass_by(model, first, last, stream.clone(), returns[last])
        else:
            skip(model, first, last, stream, returns)

    in_steps(model, leave_out, steps)


def pass_by(model: Running, first: int, last: int, stream: torch.Tensor, rest: Rest) -> None:
    """Let `stream` leave layer `last`, though the layers run; what else they return is as if they had not."""
    if not rest:
        model.layers_output[last] = stream
        return
    with in_own_run(model, first):
        args, kwargs = model.envoy(model.layer_paths[first]).inputs
        native = _native(model, first, stream)
    with in_own_run(model, last):
        model.envoy(model.layer_paths[last]).output = skipped_output(native, rest, args, kwargs)


def skip(model: Running, first: int, last: int, stream: torch.Tensor, returns: tuple[Rest, ...]) -> None:
    """Let `stream` leave layers `first` to `last` of this pass, which do not run."""
    batcher = model.interleaver.batcher
    if model.readout.layout.sequence_first and batcher is not None and batcher.batching:
        raise Unavailable(
            f"{model.model_class} stores its stream as [seq, batch, hidden], so layers cannot be skipped in "
            "several invokes of one trace: put the prompts into one invoke, or into traces of their own."
        )
    with in_own_run(model, first):
        stream = _native(model, first, stream)
    for layer in range(first, last + 1):
        envoy = model.envoy(model.layer_paths[layer])
        rest = returns[layer]
        with in_own_run(model, layer):
            args, kwargs = envoy.inputs if rest is not None else ((), {})
            envoy.skip(skipped_output(stream, rest, args, kwargs))


def in_own_run(model: Running, layer: int) -> Any:
    """While the block is open, a layer's module is asked for what it does in that layer's own run."""
    return contextlib.nullcontext() if model.runs is None else model.runs.waiting(model, layer)


def _native(model: Running, first: int, stream: torch.Tensor) -> torch.Tensor:
    """A stream as the model stores it; a soft prompt in front of it is the one that enters layer `first`."""
    layout = model.readout.layout
    if not layout.extra:
        return layout.native(stream)
    entering = Site(model.layer_paths[first], "input").read(model, "skip_layers()")
    front = entering.shape[1] - stream.shape[1]  # 0 in a step with a cache
    return torch.cat([entering[:, :front], stream], 1)


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
