"""What stands in the brackets of a result: the name of a value, or a name and a layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nnterp.collection._outputs import Index, label_of
from nnterp.collection._outputs import named as named_value
from nnterp.indices import integer


def read_key(
    key: Any, layers: Mapping[str, tuple[Index, ...]], num_layers: int, missing: str
) -> tuple[str, Index | None]:
    """The value and the layer that a key stands for.

    Args:
        key: A name in any spelling, or a name and a layer; a negative layer counts from the model's last.
        layers: For each value in the result its layers, none for a value that is not per layer.
        num_layers: Layers of the model.
        missing: What errors say of a value or layer that is not in the result.

    Returns:
        The value's name in the table, and the layer from 0 (or the layer and the number of a dictionary in it); None
        for all layers, or for a value that is not per layer.

    Raises:
        KeyError: There is no such value in the result, or it does not have this layer.
        TypeError: The layer is no integer.
    """
    parts = key if isinstance(key, tuple) else (key,)
    if not 1 <= len(parts) <= 2 or not isinstance(parts[0], str):
        raise KeyError(
            f"{key!r:.80} is no key; give the name of a value, or its name and one layer: 'layers_output', 3."
        )
    try:
        value, named = named_value(parts[0])
    except ValueError as error:
        raise KeyError(str(error)) from None
    if value.name not in layers:
        raise KeyError(f"{value.name} was not {missing}; there are: {', '.join(layers)}.")
    if len(parts) == 2:
        label = f"The layer of {value.name}"
        pair = value.name == "features" and isinstance(parts[1], tuple) and len(parts[1]) == 2
        named = (integer(parts[1][0], label), integer(parts[1][1], label)) if pair else integer(parts[1], label)
    if named is None:
        return value.name, None
    have = layers[value.name]
    if not have:
        raise KeyError(f"{value.name} is not per layer; leave out the layer {named}.")
    layer: Index
    if isinstance(named, tuple):
        layer = named[0] % num_layers if num_layers else named[0], named[1]
    else:
        layer = named + num_layers if named < 0 else named
    if layer not in have:
        there = ", ".join(label_of(value.name, one) if isinstance(one, tuple) else str(one) for one in have)
        raise KeyError(f"Layer {named} of {value.name} was not {missing}; there are: {there}.")
    return value.name, layer
