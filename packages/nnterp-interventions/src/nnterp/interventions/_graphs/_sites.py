"""Where each layer's transcoder reads and writes, checked against the model before it is run."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nnterp.errors import Unavailable
from nnterp.interventions._engine import Key
from nnterp.traced import Dictionary, Place, ReadOnly
from nnterp.values import reads, when

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer

_KEY = re.compile(r"(\w+)\[(\d+)\]")


@dataclass(frozen=True)
class Layer:
    """One layer whose feed-forward is replaced.

    Attributes:
        layer: The layer.
        dictionary: Its transcoder; None where there is none: then all that its feed-forward adds is an error.
        reads: The value that the transcoder encodes, and its layer.
        writes: The value that it decodes to.
    """

    layer: int
    dictionary: Dictionary | None
    reads: Key
    writes: Key


@dataclass(frozen=True)
class Sites:
    """The layers of a model, and the order in which a forward pass reaches what is read and written.

    Attributes:
        layers: The layers that have a feed-forward, first to last.
        entering: The value of the stream that enters the first layer.
        leaving: That of the stream that leaves the last one.
        places: Native places to read in forward order.
    """

    layers: tuple[Layer, ...]
    entering: Key
    leaving: Key
    places: tuple[Place, ...]

    @property
    def replaced(self) -> tuple[Layer, ...]:
        """Those that have a transcoder."""
        return tuple(own for own in self.layers if own.dictionary is not None)


def sites_of(model: StandardizedTransformer, transcoders: Any, what: str) -> Sites:
    """Where transcoders read and write in a model.

    Args:
        model: The model; its weights are here.
        transcoders: Layer → `Dictionary`, or one for each layer in a list.
        what: The function that needs them, for errors.

    Raises:
        TypeError: They are no dictionaries.
        ValueError: One names another layer, or does not fit the width of what it reads or writes.
        Unavailable: What a feed-forward returns cannot be replaced in this model, or is not served; says why.
    """
    given = _by_layer(model, transcoders)
    if model.readout.layout.batch != 0 or model.readout.layout.width not in (None, model.hidden_size):
        raise Unavailable(f"{what} needs one residual stream, and {model.model_class} keeps it in another layout.")
    blocks = [layer for layer in range(model.num_layers) if layer not in model.facts.only_with_image]
    layers = []
    for layer in blocks:
        if model.anatomy.blocks[layer].mlp is None:
            if layer in given:
                raise ValueError(f"transcoders has one for layer {layer}, which has no feed-forward to replace.")
            continue
        layers.append(_layer(model, layer, given.get(layer), what))
    entering, leaving = ("layers_input", blocks[0]), ("layers_output", blocks[-1])
    keys = [entering, leaving, *(key for own in layers for key in (own.reads, own.writes))]
    try:
        found = {place for key in keys for place in reads(model, model.place(*key))[0]}
        places = tuple(sorted(found, key=lambda place: when(model, place)))
    except (KeyError, TypeError) as error:
        raise Unavailable(f"{model.model_class}: in which order its values are computed is not known.") from error
    return Sites(tuple(layers), entering, leaving, places)


def _by_layer(model: StandardizedTransformer, transcoders: Any) -> dict[int, Dictionary]:
    if isinstance(transcoders, Mapping):
        pairs = list(transcoders.items())
    elif isinstance(transcoders, Sequence) and not isinstance(transcoders, str):
        if len(transcoders) != model.num_layers:
            raise ValueError(
                f"transcoders is a list of {len(transcoders)}, and {model.model_class} has {model.num_layers} layers. "
                "Give one for each layer, or {layer: transcoder} for some."
            )
        pairs = list(enumerate(transcoders))
    else:
        raise TypeError(f"transcoders is {{layer: Dictionary}} or a list of them, not {transcoders!r:.80}.")
    found: dict[int, Dictionary] = {}
    for layer, dictionary in pairs:
        if isinstance(layer, bool) or not isinstance(layer, int) or not -model.num_layers <= layer < model.num_layers:
            raise ValueError(
                f"transcoders names layer {layer!r:.40}; the model has layers 0 to {model.num_layers - 1}."
            )
        if not isinstance(dictionary, Dictionary):
            raise TypeError(f"transcoders[{layer}] is no Dictionary but {dictionary!r:.80}.")
        found[layer % model.num_layers] = dictionary
    if not found:
        raise ValueError("transcoders is empty: a graph of features needs a transcoder for at least one layer.")
    return found


def _layer(model: StandardizedTransformer, layer: int, dictionary: Dictionary | None, what: str) -> Layer:
    read = _key(model, dictionary.reads if dictionary else None, "mlps_input", layer)
    own = "mlp_contributions" if (mixed := _holds_stream(model, layer)) else "mlps_output"
    written = _key(model, dictionary.writes if dictionary else None, own, layer)
    if written[0] not in ("mlps_output", "mlp_contributions"):
        raise ValueError(
            f"transcoders[{layer}] writes {written[0]}[{layer}]: it takes the place of no feed-forward. A transcoder of "
            "an attribution graph writes mlps_output or mlp_contributions of its layer."
        )
    if mixed and written[0] == "mlps_output":
        raise ValueError(
            f"transcoders[{layer}] writes mlps_output[{layer}], which in {model.model_class} holds the stream as well: the "
            f"feed-forward's module adds to it. What it adds alone is mlp_contributions[{layer}]."
        )
    try:
        place = model.place(*written)
        model.place(*read)
    except Unavailable as error:
        raise Unavailable(
            f"{what} is not served for {model.model_class}: its feed-forward of layer {layer} cannot be replaced: {error}"
        ) from error
    if isinstance(place, ReadOnly):
        raise Unavailable(
            f"{what} is not served for {model.model_class}: its feed-forward of layer {layer} cannot be replaced: "
            f"{written[0]}[{layer}]: {place.reason}."
        )
    if dictionary is not None and model.hidden_size not in (None, width := dictionary.decoder.shape[1]):
        raise ValueError(
            f"transcoders[{layer}] writes {width} channels, and the stream of {model.model_class} has "
            f"{model.hidden_size}."
        )
    return Layer(layer, dictionary, read, written)


def _holds_stream(model: StandardizedTransformer, layer: int) -> bool:
    """Whether the module of a feed-forward returns the stream with what it adds (BLOOM, MPT)."""
    part, structure = model.anatomy.blocks[layer].mlp, model.facts.residual_of(layer)
    if part is None or part.path is None or structure.mlp is None:
        return False
    return all(term.path.startswith(f"{part.path}.") for term in structure.mlp.terms)


def _key(model: StandardizedTransformer, given: str | None, default: str, layer: int) -> Key:
    """A value and its layer from what a dictionary says of itself."""
    if given is None:
        return default, layer
    found = _KEY.fullmatch(given)
    if found is None:
        raise ValueError(f"transcoders[{layer}] names the place {given!r}; places look like {default}[{layer}].")
    if int(found[2]) != layer:
        raise ValueError(f"transcoders[{layer}] was made for {given}: it is of another layer.")
    return found[1], layer
