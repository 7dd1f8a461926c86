"""The dictionaries that are attached to a model, and the features that they make of its values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nnterp.indices import integer, read_index
from nnterp.record import Record
from nnterp.table import get_value
from nnterp.traced import Attached, Dictionary, Features, listed
from nnterp.values._aliases import canonical
from nnterp.values._images import missing
from nnterp.values._lookup import Known

At = tuple[int, int]  # a layer, and the number of a dictionary in it


class Attachment(Record):
    """A dictionary, and the values that it encodes and decodes to, each with its layer.

    Attributes:
        dictionary: The dictionary.
        reads, writes: Name and layer of a value.
    """

    def __init__(self, dictionary: Dictionary, reads: tuple[str, int], writes: tuple[str, int]) -> None:
        self.dictionary, self.reads, self.writes = dictionary, reads, writes

    def __eq__(self, other: object) -> bool:  # a dictionary holds tensors
        return self is other

    def __hash__(self) -> int:
        return id(self)


def attached_of(model: Known, attachments: Mapping[At, Attachment]) -> Attached | None:
    """Gather what travels of the dictionaries that are attached to a model; returns None if there are none.

    Raises:
        Unavailable: A value that one of them reads or writes is not there any more.
    """
    return Attached({at: _features(model, at, one) for at, one in attachments.items()}) if attachments else None


def features_of(model: Known, attachments: Mapping[At, Attachment], index: Any) -> Features:
    """Look up the features at a layer, at (layer, number), or at the name of a value that a dictionary reads or writes.

    Returns:
        Their place.

    Raises:
        ValueError: Several dictionaries are meant, or there is no such value.
        IndexError: There is no such layer, or none of its dictionaries has this number.
        Unavailable: No dictionary is attached there.
    """
    layers = model.facts.anatomy.num_layers
    if isinstance(index, str):
        value, named = canonical(index)
        index = value.name if named is None else f"{value.name}[{named % layers}]"
        mine = {at for at, one in attachments.items() if index in (spelled(one.reads), spelled(one.writes))}
    elif isinstance(index, tuple):
        label = "The layer of features"
        index = read_index(index[0], layers, label, "layers"), integer(index[1], "The number of a dictionary")
        mine = {index} & attachments.keys()
        numbers = sorted(number for layer, number in attachments if layer == index[0])
        if numbers and not mine:
            raise IndexError(f"features[{index[0]}, {index[1]}]: the dictionaries of the layer have numbers {numbers}.")
    else:
        index = read_index(index, layers, "The layer of features", "layers")
        mine = {at for at in attachments if at[0] == index}
    every = Attached({at: _features(model, at, attachments[at]) for at in sorted(mine or attachments)})
    if not mine and isinstance(index, int):
        reason = f"no dictionary is attached to it; attached are {listed(every.features.values())}"
        raise missing(f"Layer {index} of {model.facts.anatomy.model_class} has no features: {reason}.", reason)
    return every.place(index)


def spelled(at: tuple[str, int]) -> str:
    """Spell a value and its layer; returns a name, such as "layers_output[12]"."""
    return f"{at[0]}[{at[1]}]"


def _features(model: Known, at: At, one: Attachment) -> Features:
    names = spelled(one.reads), spelled(one.writes)
    places = model.place(*one.reads), model.place(*one.writes)
    axes = [get_value(name).axes for name, _ in (one.reads, one.writes)]
    return Features(one.dictionary, at, *names, places[0], places[1], axes[0], axes[1])
