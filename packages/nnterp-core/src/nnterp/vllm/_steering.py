"""Steering on vLLM: one forward pass of one request, or all passes of all requests."""

from __future__ import annotations

from typing import Any

import torch

from nnterp.errors import ShapeError
from nnterp.identity import digest
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
    chosen = _chosen(steering.steps)
    everywhere = chosen is None and steering.others["token_positions"] is None
    with model.edit() as (tracer, edit):
        length = 0
        for step in tracer.iter[:]:
            if everywhere:
                steer_pass(model, steering, None)
                continue
            tokens = model.input_ids.shape[1]
            length = length or tokens
            steer_pass(model, steering, where(steering.others["token_positions"], chosen, step, tokens, length))
    edit.identity = digest(vars(steering))
    return edit


def _chosen(steps: Any) -> Any:
    """The steps as something that holds their numbers; None for all of them."""
    if steps is None or steps == "all":
        return None
    if steps == "prompt":
        return range(1)
    if steps == "generated":
        return range(1, 1 << 40)
    if isinstance(steps, slice):
        return range(steps.start or 0, 1 << 40 if steps.stop is None else steps.stop, steps.step or 1)
    return {steps} if hasattr(steps, "__index__") else set(steps)


def where(positions: Any, chosen: Any, step: int, tokens: int, length: int) -> list[int] | None:
    """The tokens of a pass that are steered; None for all of them.

    A pass has the prompt, or one new token. If vLLM took a request out of the engine for want of memory, the pass in
    which it comes back has the prompt and all new tokens; each is then steered as in the step that it belonged to.

    Args:
        positions: Indices or slices of the prompt, one or a list of these; None for every token.
        chosen: The steps that are steered; None for all.
        step: The number of the pass.
        tokens: How many tokens it has.
        length: How many tokens the prompt has.

    Raises:
        IndexError: The prompt has no such position.
    """
    own = None if positions is None else _resolved(positions, length)
    first = length + step - tokens
    found = [
        k
        for k, position in enumerate(range(first, first + tokens))
        if (own is None or position in own) and (chosen is None or max(0, position - length + 1) in chosen)
    ]
    return None if len(found) == tokens else found


def _resolved(positions: Any, length: int) -> set[int]:
    found: set[int] = set()
    for entry in positions if isinstance(positions, list) else [positions]:
        if isinstance(entry, slice):
            found.update(range(length)[entry])
            continue
        if not -length <= int(entry) < length:
            raise IndexError(f"steer: there is no token position {entry} in a prompt of {length} tokens.")
        found.add(range(length)[int(entry)])
    return found


def steer_prompt(model: Any, steering: Steering) -> None:
    """Steer the pass of a prompt, which is running.

    Raises:
        ShapeError: A vector does not fit the stream.
        IndexError: The prompt has no such position.
    """
    positions, tokens = steering.others["token_positions"], None
    if positions is not None:
        length = model.layers_output[min(steering.vectors)].shape[1]
        tokens = where(positions, None, 0, length, length)
    steer_pass(model, steering, tokens)


def steer_pass(model: Any, steering: Steering, tokens: list[int] | None) -> None:
    """Steer the stream in the forward pass that is running, at some of its tokens; None for all of them.

    Raises:
        ShapeError: A vector does not fit the stream.
    """
    require_running(model, "steer()")
    own = steering.others
    added = own["mode"] == "add" and not own["keep_norm"] and tokens is None
    for layer, vector in steering.vectors.items() if tokens != [] else ():
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
        if tokens is not None:
            kept = stream.clone()
            kept[:, tokens] = new[:, tokens]
            new = kept
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
