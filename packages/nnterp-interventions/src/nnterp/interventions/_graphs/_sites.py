"""Where each layer's transcoder reads and writes, checked against the model before it is run."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from nnterp.errors import Unavailable
from nnterp.interventions._engine import Key
from nnterp.traced import CrossLayerTranscoder, Dictionary, Place, ReadOnly
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
        cross: The cross-layer transcoder that the layers' dictionaries are parts of; None if each stands alone.
    """

    layers: tuple[Layer, ...]
    entering: Key
    leaving: Key
    places: tuple[Place, ...]
    cross: CrossLayerTranscoder | None = None

    @property
    def replaced(self) -> tuple[Layer, ...]:
        """Those that have a transcoder."""
        return tuple(own for own in self.layers if own.dictionary is not None)

    def into(self, layer: int) -> list[int]:
        """The layers whose features write to a layer."""
        if self.cross is None:
            return [own.layer for own in self.replaced if own.layer == layer]
        return [own.layer for own in self.replaced if own.layer <= layer]

    def decoder(self, source: int, layer: int) -> torch.Tensor:
        """What features of one layer write to another, or to their own, `[features, hidden]`."""
        if self.cross is not None:
            return self.cross.decoders[source][:, layer - source]
        (own,) = (own.dictionary for own in self.replaced if own.layer == source)
        assert own is not None
        return own.decoder

    def decode(self, features: Mapping[int, torch.Tensor], layer: int, x: torch.Tensor) -> torch.Tensor:
        """What transcoders make of a layer's feed-forward, `[..., hidden]`.

        Args:
            features: Layer → its features, `[..., features]`, of this layer and of those before it.
            layer: The layer; it has a transcoder.
            x: What is encoded there.
        """
        if self.cross is not None:
            return self.cross.decode([features[i] for i in range(layer + 1)], layer, x)
        (own,) = (own.dictionary for own in self.replaced if own.layer == layer)
        assert own is not None
        return own.decode(features[layer], x)


def sites_of(model: StandardizedTransformer, transcoders: Any, what: str) -> Sites:
    """Where transcoders read and write in a model.

    Args:
        model: The model; its weights are here.
        transcoders: Layer → `Dictionary`, one for each layer in a list, or a `CrossLayerTranscoder`.
        what: The function that needs them, for errors.

    Raises:
        TypeError: They are no dictionaries.
        ValueError: One names another layer, or does not fit the width of what it reads or writes.
        Unavailable: What a feed-forward returns cannot be replaced in this model, or is not served; says why.
    """
    cross = transcoders if isinstance(transcoders, CrossLayerTranscoder) else None
    given = _by_layer(model, transcoders if cross is None else list(cross.encoders))
    if model.readout.layout.batch != 0 or model.readout.layout.width not in (None, model.hidden_size):
        raise Unavailable(f"{what} needs one residual stream, and {model.model_class} keeps it in another layout.")
    blocks = [layer for layer in range(model.num_layers) if layer not in model.facts.only_with_image]
    layers = []
    for layer in blocks:
        if model.anatomy.blocks[layer].mlp is None:
            if layer in given:
                raise ValueError(f"transcoders has one for layer {layer}, which has no feed-forward to replace.")
            continue
        own = _layer(model, layer, given.get(layer), what)
        if cross is not None:  # its places are those of all layers
            names = cross.reads or own.reads[0], cross.writes or own.writes[0]
            own = Layer(layer, own.dictionary, (names[0], layer), (names[1], layer))
        layers.append(own)
    entering, leaving = ("layers_input", blocks[0]), ("layers_output", blocks[-1])
    keys = [entering, leaving, *(key for own in layers for key in (own.reads, own.writes))]
    try:
        found = {place for key in keys for place in reads(model, model.place(*key))[0]}
        places = tuple(sorted(found, key=lambda place: when(model, place)))
    except (KeyError, TypeError) as error:
        raise Unavailable(f"{model.model_class}: in which order its values are computed is not known.") from error
    for own in layers:
        first, last = (
            max(places.index(place) for place in reads(model, model.place(*key))[0]) for key in (own.reads, own.writes)
        )
        if first >= last:
            raise ValueError(
                f"transcoders[{own.layer}] reads {own.reads[0]}[{own.layer}], which the model computes after the "
                f"{own.writes[0]}[{own.layer}] that it writes."
            )
    return Sites(tuple(layers), entering, leaving, places, cross)


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
        raise TypeError(
            f"transcoders is {{layer: Dictionary}}, a list of them or a CrossLayerTranscoder, not {transcoders!r:.80}."
        )
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
            f"transcoders[{layer}] writes {written[0]}[{layer}]: it takes the place of no feed-forward. A transcoder "
            "of an attribution graph writes mlps_output or mlp_contributions of its layer."
        )
    if mixed and written[0] == "mlps_output":
        raise ValueError(
            f"transcoders[{layer}] writes mlps_output[{layer}], which in {model.model_class} holds the stream as well: "
            f"the feed-forward's module adds to it. What it adds alone is mlp_contributions[{layer}]."
        )
    try:
        place = model.place(*written)
        model.place(*read)
    except Unavailable as error:
        raise Unavailable(
            f"{what} is not served for {model.model_class}: its feed-forward of layer {layer} cannot be replaced: "
            f"{error}"
        ) from error
    if isinstance(place, ReadOnly):
        raise Unavailable(
            f"{what} is not served for {model.model_class}: its feed-forward of layer {layer} cannot be replaced: "
            f"{written[0]}[{layer}]: {place.reason}."
        )
    if dictionary is not None and dictionary.scaling is not None:
        raise Unavailable(
            f"{what} is not served with transcoders[{layer}] ({dictionary.source}): it scales each activation by its "
            "own norm before it encodes it, so that its features are not linear in the stream."
        )
    if dictionary is not None and model.hidden_size not in (None, width := dictionary.output_width):
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
