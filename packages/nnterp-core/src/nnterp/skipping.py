"""Leave layers out of the running forward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from nnterp.errors import ShapeError, Unavailable
from nnterp.huggingface import text_config
from nnterp.readout import skipped_output
from nnterp.values._accessors import layer_index, require_running

if TYPE_CHECKING:
    from nnterp.traced_transformer import TracedTransformer


def skip_layers(model: TracedTransformer, start: int, end: int, skip_with: torch.Tensor | None) -> None:
    """See `StandardizedTransformer.skip_layers`."""
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
            f"{model.model_class} keeps its stream as [seq, batch, hidden], so layers cannot be skipped in "
            "several invokes of one trace: put the prompts into one invoke, or into traces of their own."
        )
    stream = model.readout.layout.native(stream)
    for layer in range(first, last + 1):
        envoy = model.envoy(model.layer_paths[layer])
        rest = model.readout.returns[layer]
        args, kwargs = envoy.inputs if rest is not None else ((), {})
        envoy.skip(skipped_output(stream, rest, args, kwargs))


def require_skippable(model: TracedTransformer, layers: range) -> None:
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


def lenders(module: nn.Module, count: int) -> list[tuple[int, list[int], str]]:
    """(layer, the layers that borrow from it, what they borrow), as the config declares it."""
    config = text_config(module.config)
    found = []
    shared = getattr(config, "num_kv_shared_layers", None) or 0
    if shared:  # Gemma 3n and 4: the last layer of each type before the sharing ones lends them its keys and values
        types = list(getattr(config, "layer_types", None) or [""] * count)
        for kind in dict.fromkeys(types[count - shared :]):
            own = [i for i in range(count - shared) if types[i] == kind]
            if own:
                borrowers = [i for i in range(count - shared, count) if types[i] == kind]
                found.append((own[-1], borrowers, "its keys and values"))
    indexers = list(getattr(config, "indexer_types", None) or ())
    for i, kind in enumerate(indexers[:count]):  # sparse attention: a "shared" layer uses the keys a "full" one picked
        if kind == "full":
            end = next((j for j in range(i + 1, count) if indexers[j] == "full"), count)
            if end > i + 1:
                found.append((i, list(range(i + 1, end)), "the keys it picks"))
    return found
