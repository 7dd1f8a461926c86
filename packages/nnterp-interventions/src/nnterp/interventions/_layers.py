"""The layers that a call asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nnterp.errors import Unavailable
from nnterp.indices import integers, read_indices
from nnterp.interventions._engine import At, positions_axis
from nnterp.values import get_value, stack_depth

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


def require_once(model: StandardizedTransformer, what: str) -> None:
    """Raise for a looped model, whose layers run several times.

    Raises:
        Unavailable: The model is looped; `what` is not served for it.
    """
    if model.anatomy.runs:
        raise Unavailable(
            f"{what} is not served for {model.model_class}: it runs its layers several times, and between two passes "
            "its own code stands in the stream."
        )


def places_with(model: StandardizedTransformer, names: list[str], layers: Any, images: bool = False) -> list[At]:
    """As `layers_with`; of features, the dictionaries asked for: a layer, or (layer, number) where a layer has several.

    Raises:
        TypeError, ValueError, IndexError, Unavailable: As `layers_with`; a layer has several dictionaries and no number
            was given, or a pair may mean two layers or a dictionary.
    """
    if names == ["features"] and model.attachments:
        return _dictionaries(model, layers, images)
    return [*layers_with(model, names, layers, images)]


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
    if {get_value(name).stack for name in names} == {"encoder"}:
        depth = stack_depth(model.facts, get_value(names[0]))
        chosen = list(range(depth)) if layers is None else read_indices(layers, depth, "layers", "layers")
    else:
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


def _dictionaries(model: StandardizedTransformer, layers: Any, images: bool) -> list[At]:
    """The dictionaries asked for: a layer if it has one, (layer, number) if it has several.

    Of a prompt without an image, those of layers that run without one.

    Raises:
        TypeError, ValueError: As `layers_with`; a layer has several dictionaries and no number was given; or a pair may
            mean two layers or a dictionary.
        IndexError: There is no such layer, or no dictionary of this number in it.
        Unavailable: No dictionary is attached to a layer that was asked for, or to any that runs.
    """
    if layers is None or (isinstance(layers, str) and layers == "all"):
        attached = sorted(model.attachments)
        running = set(model.layers_of_texts(images=images))
        found = [at for at in attached if at[0] in running]
        if not found:
            model.layers_of_texts([at[0] for at in attached], images)  # says why
        return [_shortest(model, at) for at in found]
    if _is_pair(layers) and (layers[0] % model.num_layers, layers[1]) in model.attachments:
        a, b = layers
        if a != b and all(_alone(model, layer % model.num_layers) for layer in layers):
            raise ValueError(
                f"layers=({a}, {b}) may mean the layers {a} and {b}, or dictionary {b} of layer {a}: give "
                f"[{a}, {b}] or [({a}, {b})]."
            )
        layers = [layers]
    if not isinstance(layers, (list, tuple)) or not any(map(_is_pair, layers)):
        layers = layers_of(model, layers)
    return [_shortest(model, model.place("features", own).index) for own in layers]  # type: ignore[attr-defined]


def _shortest(model: StandardizedTransformer, at: tuple[int, int]) -> At:
    """A dictionary's index, as its layer alone if this has no other."""
    return at[0] if _alone(model, at[0]) else at


def _alone(model: StandardizedTransformer, layer: int) -> bool:
    """Whether a layer has one dictionary."""
    return sum(other == layer for other, _ in model.attachments) == 1


def _is_pair(given: Any) -> bool:
    return isinstance(given, tuple) and len(given) == 2 and all(type(entry) is int for entry in given)
