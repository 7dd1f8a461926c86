"""The layers that a call asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nnterp.errors import Unavailable
from nnterp.indices import integers, read_indices
from nnterp.interventions._engine import positions_axis
from nnterp.values import get_value

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer


def layers_of(model: StandardizedTransformer, layers: Any, name: str = "layers", images: bool = False) -> list[int]:
    """The layers asked for as indices from 0, in the order given; all that run on a text if None or "all".

    With `images`, every prompt has an image, and the layers that run only with one run too.

    Raises:
        TypeError: `layers` is something else than indices.
        ValueError: `layers` is empty.
        IndexError: There is no such layer.
        Unavailable: A layer that was named runs only with an image.
    """
    layers = integers(layers, name)
    read = None if layers is None else read_indices(layers, model.num_layers, name, "layers")
    return model.layers_of_texts(read, images)


def layers_with(model: StandardizedTransformer, names: list[str], layers: Any, images: bool = False) -> list[int]:
    """The layers asked for, all of which must have the values; if None, the layers that have them.

    Raises:
        TypeError: `layers` is something else than indices.
        ValueError: A value is not per layer, or has no axis of positions; or `layers` is empty.
        Unavailable: A layer that was asked for does not have a value, or no layer has all of them.
    """
    for name in names:
        value = get_value(name)
        if not value.per_layer:
            raise ValueError(f"{name} is not a value of layers; take one that is, such as layers_output.")
        positions_axis(name)
    layers = integers(layers, "layers")
    chosen = layers_of(model, layers, images=images)
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
