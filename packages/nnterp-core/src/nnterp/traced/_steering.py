"""Add a vector to the residual stream of the running forward pass."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from nnterp.errors import ShapeError
from nnterp.traced._accessors import layer_index, require_running

if TYPE_CHECKING:
    from nnterp.traced._running import Running


def steer(
    model: Running,
    layers: int | Iterable[int],
    vector: torch.Tensor,
    factor: float,
    token_positions: Any,
    batch_index: Any,
) -> None:
    """Add `factor * vector` to the stream leaving each layer. The stream is replaced, not edited in place."""
    require_running(model, "steer()")
    wanted: list[Any] = list(layers) if isinstance(layers, Iterable) else [layers]
    for layer in sorted({layer_index(i, model.num_layers, "steer(layers=...)") for i in wanted}):
        stream = model.layers_output[layer]
        step = factor * vector.to(device=stream.device, dtype=stream.dtype)
        where = _where(token_positions, batch_index)
        new = stream.clone()
        try:
            new[where] = stream[where] + step
        except (RuntimeError, IndexError) as error:
            raise ShapeError(
                f"steer: the stream leaving layer {layer} has shape {list(stream.shape)} (batch, seq, hidden); a "
                f"vector of shape {list(vector.shape)} at token_positions={token_positions}, batch_index={batch_index} "
                f"does not fit ({error})."
            ) from error
        model.layers_output[layer] = new


def _where(token_positions: Any, batch_index: Any) -> Any:
    if token_positions is None and batch_index is None:
        return slice(None)
    if token_positions is None:
        return batch_index
    if batch_index is None:
        return (slice(None), token_positions)
    return (batch_index, token_positions)
