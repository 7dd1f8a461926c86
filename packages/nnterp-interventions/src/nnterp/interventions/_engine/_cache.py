"""The key-value cache of an unedited run, from which the rows of a batch take the positions before their edits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer

KeysAndValues: TypeAlias = tuple[tuple[torch.Tensor, torch.Tensor], ...]  # [prompts, heads, seq, head_dim] per layer


def new_cache(model: StandardizedTransformer) -> DynamicCache:
    """An empty cache with layers of the types that the model's config asks for."""
    return DynamicCache(config=model._module.config)


def stored(cache: DynamicCache) -> KeysAndValues:
    """The keys and values of every layer of a cache."""
    return tuple((layer.keys, layer.values) for layer in cache.layers)


def continuing(
    model: StandardizedTransformer,
    cache: KeysAndValues,
    which: torch.Tensor,
    length: int,
    counts: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Keywords for a forward pass that continues after the first `length` positions of cached prompts.

    Args:
        model: The model.
        cache: Keys and values of the unedited runs.
        which: For each row of the batch, the index of its prompt in the cache, `[rows]`.
        length: Number of cached positions.
        counts: Layer i runs the first `counts[i]` rows; at least one (dummy) row always runs. All rows if None.
    """
    filled = new_cache(model)
    same_prompt = bool((which == which[0]).all())
    for index, (keys, values) in enumerate(cache):
        own = (which if counts is None else which[: max(1, counts[index])]).to(keys.device)
        if same_prompt:  # a view: nothing is copied before the model appends its own keys
            own_keys, own_values = (kept[own[0], :, :length].expand(len(own), -1, -1, -1) for kept in (keys, values))
        else:
            own_keys, own_values = keys[own, :, :length], values[own, :, :length]
        layer = filled.layers[index] if index < len(filled.layers) else None
        if isinstance(layer, DynamicLayer) and type(layer) is DynamicLayer:
            layer.lazy_initialization(own_keys, own_values)
            layer.keys, layer.values = own_keys, own_values
        else:
            filled.update(own_keys, own_values, index)
    return {"past_key_values": filled, "use_cache": True}
