"""Leave layers out of the running forward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from nnterp.errors import ShapeError
from nnterp.values import get_value, read_value
from nnterp.values._accessors import layer_index, require_running

if TYPE_CHECKING:
    from nnterp.standardized_transformer import StandardizedTransformer


def skip_layers(model: StandardizedTransformer, start: int, end: int, skip_with: torch.Tensor | None) -> None:
    """See `StandardizedTransformer.skip_layers`."""
    first = layer_index(start, model.num_layers, "skip_layers(start_layer)")
    last = layer_index(end, model.num_layers, "skip_layers(end_layer)")
    if last < first:
        raise ValueError(f"skip_layers({start}, {end}): the last layer to skip comes before the first.")
    require_running(model, "skip_layers()")
    entering = read_value(model, get_value("layers_input"), first)
    stream = entering if skip_with is None else skip_with
    if stream.shape != entering.shape:
        raise ShapeError(
            f"skip_with has shape {list(stream.shape)}; the residual stream entering layer {first} has shape {list(entering.shape)}."
        )
    stream = stream.to(device=entering.device, dtype=entering.dtype)
    for layer in range(first, last + 1):
        count = model.readout.returns[layer]
        model.envoy(model.anatomy.blocks[layer].path).skip(stream if count is None else (stream, *[None] * (count - 1)))
