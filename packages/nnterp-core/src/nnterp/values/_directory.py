"""Where every value of one model is served, small enough to be sent with every request."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from nnterp.errors import Unavailable
from nnterp.record import relocated

if TYPE_CHECKING:
    from nnterp.standardized_transformer import StandardizedTransformer
    from nnterp.values._places import Place

_LAYER = "*"  # stands for the path of the layer, so that like layers share one entry


class Directory:
    """For each value and each role of a module: what serves it, and on which layers; or why nothing does.

    Attributes:
        entries: Name → (place, or path of a module; None where there is none; the reason; layers, None for a value that
            is not per layer).
    """

    def __init__(self, entries: dict[str, list[tuple[Any, str, tuple[Any, ...] | None]]]) -> None:
        self.entries = entries

    def place(self, name: str, layer: int | tuple[int, int] | None, layer_paths: tuple[str, ...]) -> Place:
        """Where a value is served.

        Raises:
            Unavailable: Nowhere; says why.
        """
        for found, reason, layers in self.entries[name]:
            if layers is None or layer in layers:
                if found is None:
                    raise Unavailable(reason)
                if layer is None:
                    return found
                return relocated(found, _LAYER, layer_paths[layer[0] if isinstance(layer, tuple) else layer])
        raise Unavailable(f"{name} of layer {layer} was not looked up before the request was sent.")

    def module_path(self, role: str, layer: int, layer_paths: tuple[str, ...]) -> str:
        """Path of the module that plays a role in a layer.

        Raises:
            Unavailable: There is none; says why.
        """
        return self.place(role, layer, layer_paths)  # type: ignore[return-value]

    def having(self, name: str) -> tuple[int, ...]:
        """The layers that have something."""
        served = [layers or () for found, _, layers in self.entries[name] if found is not None]
        return tuple(sorted(i for layers in served for i in layers if isinstance(i, int)))


def directory_of(model: StandardizedTransformer) -> Directory:
    """Look everything up, as a request needs it that is answered where nothing can be looked up."""
    from nnterp.values._table import VALUES

    entries = {}
    for value in VALUES.values():
        if value.per_layer:
            several = [(b.index, i) for b in model.anatomy.blocks for i in range(len(b.attentions))]
            at = [*range(model.num_layers), *(several if value.role == "self_attn" else ())]
            entries[value.name] = _per_layer(model, lambda layer, name=value.name: model.place(name, layer), at)
        else:
            found, reason = _or_reason(lambda name=value.name: model.place(name))
            entries[value.name] = [(found, reason, None)]
    for role in ("self_attn", "mixer", "mlp"):
        layers = range(model.num_layers)
        entries[role] = _per_layer(model, lambda layer, role=role: model.module_path(role, layer), layers)
    return Directory(entries)


def _per_layer(
    model: StandardizedTransformer, look_up: Any, at: Iterable[int | tuple[int, int]]
) -> list[tuple[Any, str, tuple[Any, ...] | None]]:
    groups: dict[tuple[Any, str], list[Any]] = {}
    for layer in at:
        path = model.layer_paths[layer[0] if isinstance(layer, tuple) else layer]
        found, reason = _or_reason(lambda layer=layer: look_up(layer))
        reason = reason.replace(f"Layer {layer} of", "A layer of").replace(path, _LAYER)
        groups.setdefault((relocated(found, path, _LAYER), reason), []).append(layer)
    return [(found, reason, tuple(layers)) for (found, reason), layers in groups.items()]


def _or_reason(look_up: Any) -> tuple[Any, str]:
    try:
        return look_up(), ""
    except Unavailable as error:
        return None, str(error)
