"""The layers that a call asks for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from nnterp.errors import Unavailable
from nnterp.interventions._engine import positions_axis
from nnterp.values import get_value, layer_index

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer


def layers_of(model: StandardizedTransformer, layers: int | Sequence[int] | None) -> list[int]:
    """The layers asked for as indices from 0; if None, all that a text runs through.

    Raises:
        ValueError: `layers` is empty.
        IndexError: There is no such layer.
        Unavailable: A layer that was asked for runs only with an image.
    """
    if layers is None:
        return model.layers_of_texts()
    wanted: list[int] = list(layers) if isinstance(layers, Iterable) else [layers]
    if not wanted:
        raise ValueError("layers is empty; give at least one layer, or None for all.")
    return model.layers_of_texts(layer_index(layer, model.num_layers, "layers") for layer in wanted)


def layers_with(model: StandardizedTransformer, names: list[str], layers: int | Sequence[int] | None) -> list[int]:
    """The layers asked for, all of which must have the values; if None, the layers that have them.

    Raises:
        ValueError: A value is not per layer, or has no axis of positions.
        Unavailable: A layer that was asked for does not have a value, or no layer has all of them.
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
