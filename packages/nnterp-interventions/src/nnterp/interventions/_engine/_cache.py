"""The key-value cache of an unedited run, from which the rows of a batch take the positions before their edits."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer

# transformers 5.24 calls a cache `cache`. It warns of the older name, which nnsight passes on, at the line that called
# the forward: one of nnsight, or of its own decorator where the forward has one.
warnings.filterwarnings(
    "ignore", "`past_key_values` is deprecated", FutureWarning, module=r"nnsight\.|transformers\.utils\.generic"
)

KeysAndValues: TypeAlias = tuple[tuple[torch.Tensor, torch.Tensor], ...]  # [prompts, heads, seq, head_dim] per layer


def new_cache(model: StandardizedTransformer) -> DynamicCache:
    """An empty cache with layers of the types that the model's config asks for."""
    return DynamicCache(config=model._module.config)


def stored(cache: DynamicCache) -> KeysAndValues:
    """The keys and values of every layer of a cache."""
    return tuple((layer.keys, layer.values) for layer in cache.layers)


def continued_from(cache: DynamicCache) -> dict[str, Any]:
    """Keywords of a traced forward pass that goes on from a cache and fills it.

    nnsight knows a cache by this name alone: beside any other it would add a mask of the new tokens.
    """
    return {"past_key_values": cache, "use_cache": True}


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
    one = int(which[0]) if bool((which == which[0]).all()) else None
    for index, (keys, values) in enumerate(cache):
        own = (which if counts is None else which[: max(1, counts[index])]).to(keys.device)
        prefix = Prefix(keys[:, :, :length], values[:, :, :length], own, one)
        layer: Any = filled.layers[index] if index < len(filled.layers) else None
        if type(layer) is not DynamicLayer:
            filled.update(*prefix.rows(), index)
        elif model.lenders:  # later layers read what this one stores
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = prefix.rows()
        else:
            filled.layers[index] = Continued(prefix)
    return continued_from(filled)


class Prefix:
    """The keys and values of the positions before the edits, which rows of one prompt share.

    Attributes:
        keys, values: `[prompts, heads, seq, head_dim]`.
        which: For each row the index of its prompt.
        one: The prompt of all rows, if they have the same.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, which: torch.Tensor, one: int | None) -> None:
        self.keys, self.values, self.which, self.one = keys, values, which, one

    def rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`[rows, heads, seq, head_dim]` each; views if all rows have one prompt."""
        if self.one is None:
            return self.keys[self.which], self.values[self.which]
        keys, values = (t[self.one].expand(len(self.which), -1, -1, -1) for t in (self.keys, self.values))
        return keys, values


class Continued(DynamicLayer):
    """A layer of a cache for one forward pass: it returns prefix and new positions and stores neither for each row.

    transformers' own layer stores what it returns, so that a batch would hold a copy of the prefix for each row in
    every layer at once; here that copy lives as long as one layer runs.
    """

    def __init__(self, prefix: Prefix) -> None:
        super().__init__()
        self.lazy_initialization(prefix.keys, prefix.values)
        self.keys, self.values, self.prefix = prefix.keys, prefix.values, prefix

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        """Keys and values `[rows, heads, prefix and new positions, head_dim]`."""
        keys, values = self.prefix.rows()
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)
