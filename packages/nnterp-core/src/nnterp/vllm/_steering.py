"""Steering on vLLM: one forward pass of one request, or all passes of all requests."""

from __future__ import annotations

from typing import Any

import torch

from nnterp.errors import ShapeError
from nnterp.traced import Steering, change, require_running


def require_plain(steering: Steering, width: int | None = None) -> Steering:
    """Return the steering if vLLM can run it.

    Raises:
        TypeError: A token position is neither an index nor a slice.
        ShapeError: A vector is not `[width]`.
    """
    positions = steering.others["token_positions"]
    for entry in positions if isinstance(positions, list) else [positions]:
        if entry is not None and not isinstance(entry, slice) and not hasattr(entry, "__index__"):
            raise TypeError(f"steer: on vLLM, token_positions are indices or slices, not {entry!r}.")
    for layer, vector in steering.vectors.items():
        if width and (vector.dim() != 1 or vector.shape[0] != width):
            raise ShapeError(f"steer: the vector for layer {layer} has shape {list(vector.shape)}; give [{width}].")
    return steering


def in_every_step(model: Any, steering: Steering) -> Any:
    """Install a steering in the engine, for all requests. Returns nnsight's handle; its `clear()` ends the steering."""
    limited = steering.steps not in (None, "all")
    chosen = _chosen(steering.steps)
    with model.edit() as (tracer, edit):
        for step in tracer.iter[:]:
            if limited:
                model.inputs  # noqa: B018  (waits for the pass, without which a step that is not chosen never ends)
            if not limited or step in chosen:
                steer_pass(model, steering, step)
    return edit


def _chosen(steps: Any) -> Any:
    if steps is None or steps == "all":
        return range(0)
    if steps == "prompt":
        return range(1)
    if steps == "generated":
        return range(1, 1 << 40)
    if isinstance(steps, slice):
        return range(steps.start or 0, 1 << 40 if steps.stop is None else steps.stop, steps.step or 1)
    return {steps} if hasattr(steps, "__index__") else set(steps)


def steer_pass(model: Any, steering: Steering, step: int) -> None:
    """Steer the stream in the forward pass that is running.

    Raises:
        ShapeError: A vector does not fit the stream.
    """
    require_running(model, "steer()")
    own = steering.others
    added = own["mode"] == "add" and not own["keep_norm"] and own["token_positions"] is None
    for layer, vector in steering.vectors.items():
        if added:
            add(model, layer, own["factor"] * vector)
            continue
        stream = model.layers_output[layer]
        vector = vector.to(stream.device)
        try:
            new = change(stream, vector, own)
        except RuntimeError as error:
            raise ShapeError(
                f"steer: layer {layer}: a vector of shape {list(vector.shape)} does not fit the stream, "
                f"{list(stream.shape)} ({error})."
            ) from error
        if own["token_positions"] is not None:
            new = _at(own["token_positions"], stream, new, step)
        model.layers_output[layer] = new


def add(model: Any, layer: int, vector: torch.Tensor) -> None:
    """Add a vector to the stream leaving a layer, in place and without a copy.

    Raises:
        ShapeError: The vector does not fit the stream.
    """
    label = f"layers_output[{layer}]"
    carried = model.place("layers_output", layer).parts(model, label)[0]
    try:
        carried += vector.to(carried)
    except RuntimeError as error:
        raise ShapeError(
            f"steer: layer {layer}: a vector of shape {list(vector.shape)} does not fit the stream, "
            f"{list(carried.shape)} ({error})."
        ) from error


def _at(positions: Any, stream: torch.Tensor, new: torch.Tensor, step: int) -> torch.Tensor:
    """`new` at these positions of the prompt, `stream` elsewhere. Later steps have no prompt positions: `stream`."""
    kept = stream.clone()
    if step:
        return kept
    for entry in positions if isinstance(positions, list) else [positions]:
        kept[:, entry] = new[:, entry]
    return kept
