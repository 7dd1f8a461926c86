"""Which layers have a value, and how many heads or neurons it has in them."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from nnterp.errors import Unavailable
from nnterp.inputs import Row
from nnterp.interventions._edits import axes_of, positions_axis, units_axis
from nnterp.interventions._lens import layers_of
from nnterp.interventions._states import states_of
from nnterp.values import get_value

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer

_counted: weakref.WeakKeyDictionary[torch.nn.Module, dict[tuple[str, int], int]] = weakref.WeakKeyDictionary()


def layers_with(model: StandardizedTransformer, names: list[str], layers: int | Sequence[int] | None) -> list[int]:
    """The layers named, all of which must have the values; or those that have them.

    Raises:
        Unavailable: A named layer has not; or no layer has all of them.
    """
    for name in names:
        value = get_value(name)
        if not value.per_layer:
            raise ValueError(f"{name} is not a value of layers; take one that is, such as layers_output.")
        positions_axis(name)
    chosen = layers_of(model, layers)
    kept: list[int] = []
    reason: Unavailable | None = None
    for layer in chosen:
        try:
            for name in names:
                model.place(name, layer)
            kept.append(layer)
        except Unavailable as error:
            if layers is not None:
                raise
            reason = error
    if not kept:
        assert reason is not None
        raise reason
    return kept


def units_of(model: StandardizedTransformer, names: list[str], heads: Any, layers: Sequence[int]) -> list[int | None]:
    """Heads (or neurons) asked for, as indices from 0; [None] if they are not told apart.

    Raises:
        ValueError: The values have no units or not the same, there are unequally many in these layers and "all" or a
            negative index was asked for, or nothing was.
        IndexError: A layer has no such head.
    """
    if heads is None:
        return [None]
    axes = {axes_of(get_value(name))[1 + units_axis(name)] for name in names}
    if len(axes) > 1:
        raise ValueError(f"{', '.join(names)} do not have the same kind of units ({', '.join(sorted(axes))}).")
    axis = axes.pop()
    if isinstance(heads, str) and heads != "all":
        raise ValueError(f'heads are indices or "all", not {heads!r}.')
    wanted = [] if isinstance(heads, str) else [heads] if hasattr(heads, "__index__") else list(heads)
    if not wanted and not isinstance(heads, str):
        raise ValueError('heads is empty; give at least one, or "all".')
    sizes = _sizes(model, names, axis, layers)
    if sizes is None:
        if not wanted:
            raise ValueError(f"This model's config does not say how many {axis} it has; give their indices.")
        return wanted
    size = min(sizes.values())
    if len(set(sizes.values())) > 1 and (not wanted or min(wanted) < 0):
        counts = ", ".join(f"layer {layer} has {count}" for layer, count in sizes.items())
        raise ValueError(f"These layers do not have equally many {axis} ({counts}); give indices from 0.")
    for head in wanted:
        if not -size <= head < size:
            where = "the model has" if len(set(sizes.values())) == 1 else "one of the layers has"
            raise IndexError(f"heads={head}: {where} {size} {axis}, so indices go from {-size} to {size - 1}.")
    return [head % size for head in wanted] if wanted else list(range(size))


def _sizes(
    model: StandardizedTransformer, names: Sequence[str], axis: str, layers: Sequence[int]
) -> dict[int, int] | None:
    """How many units each layer has: counted in a short run where the weights are there, else what the config says."""
    if not model.dispatched or model.interleaver.interleaving:
        declared = {"heads": model.num_heads, "kv_heads": model.num_kv_heads, "neurons": model.intermediate_size}
        size = declared.get(axis)
        return None if size is None else dict.fromkeys(layers, size)
    known = _counted.setdefault(model._module, {})
    keys = [(name, layer) for name in names for layer in layers]
    missing = [key for key in keys if key not in known]
    if missing:
        ((states,), _) = states_of(model, [Row((1, 1))], missing)
        known.update({key: tensor.shape[units_axis(key[0])] for key, tensor in states.items()})
    return {layer: min(known[name, layer] for name in names) for layer in layers}
