"""Look up where every value of a model is served, for a request to a worker that cannot look anything up."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Any

from nnterp.errors import Unavailable
from nnterp.record import relocated
from nnterp.table import VALUES
from nnterp.traced import LAYER, Directory
from nnterp.values._lookup import Known

NO_DICTIONARY = "No dictionary is attached: nnterp.attach(model, dictionary, at='layers_output[3]') attaches one."

Index = int | tuple[int, int]
Entry = tuple[Any, str, tuple[Any, ...] | None]


def directory_of(
    model: Known, module_path: Callable[[str, int], str], without: Collection[str] = frozenset()
) -> Directory:
    """Make the directory that travels with a model.

    Args:
        model: The model.
        module_path: (role, layer) → native path of the module that plays the role; raises `Unavailable` for none.
        without: Values that are left out.

    Returns:
        The directory, which says where every value and part is served, or why it is not.
    """
    anatomy = model.facts.anatomy
    paths = model.facts.readout.layer_paths
    layers = range(anatomy.num_layers)
    several = [(layer.index, i) for layer in anatomy.blocks for i in range(len(layer.attentions))]
    entries: dict[str, list[Entry]] = {}
    for name, value in VALUES.items():
        if name == "features":  # dictionaries travel beside the directory
            entries[name] = [(None, NO_DICTIONARY, None)]
            continue
        if name in without or value.stack in ("encoder", "cross"):  # requests are refused for models that have these
            continue
        if value.stack == "vision" and value.per_layer:
            vision = range(0 if model.facts.vision is None else len(model.facts.vision.layers))
            each = [(*_found_or_reason(partial(model.place, name), layer), (layer,)) for layer in vision]
            entries[name] = [*each, (*_found_or_reason(partial(model.place, name), 0), None)][: len(each) or 1]
            continue
        if value.per_layer:
            at = [*layers, *(several if value.role == "self_attn" else ())]
            entries[name] = _per_layer(paths, partial(model.place, name), at)
        else:
            entries[name] = [(*_found_or_reason(model.place, name), None)]
    for role in ("self_attn", "mixer", "mlp"):
        entries[role] = _per_layer(paths, partial(module_path, role), layers)
    return Directory(entries)


def _per_layer(paths: tuple[str, ...], look_up: Callable[[Any], Any], at: Iterable[Index]) -> list[Entry]:
    """One entry for all layers that have the same place, or the same reason, up to the layer's own path."""
    groups: dict[tuple[Any, str], list[Index]] = {}
    for layer in at:
        path = paths[layer[0] if isinstance(layer, tuple) else layer]
        found, reason = _found_or_reason(look_up, layer)
        reason = reason.replace(f"Layer {layer} of", "A layer of").replace(path, LAYER)
        groups.setdefault((relocated(found, path, LAYER), reason), []).append(layer)
    return [(found, reason, tuple(layers)) for (found, reason), layers in groups.items()]


def _found_or_reason(look_up: Callable[[Any], Any], what: Any) -> tuple[Any, str]:
    try:
        return look_up(what), ""
    except Unavailable as error:
        return None, str(error)
