"""Where every value of one model is served, in a form small enough to travel with every request."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nnterp.errors import Unavailable
from nnterp.record import relocated

if TYPE_CHECKING:
    from nnterp.traced._running import Place

LAYER = "*"  # stands for a layer's path, so that layers of one kind share an entry


class Directory:
    """For each value and each role of a module: what serves it, and on which layers; or why nothing does.

    Attributes:
        entries: Name → (place, or path of a module; None where there is none; the reason; layers, None for a value that
            is not per layer).
    """

    def __init__(self, entries: dict[str, list[tuple[Any, str, tuple[Any, ...] | None]]]) -> None:
        self.entries = entries

    def place(self, name: str, layer: Any, layer_paths: tuple[str, ...]) -> Place:
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
                index = layer[0] if isinstance(layer, tuple) else layer
                # towers may have more layers, which are named by their own paths
                return relocated(found, LAYER, layer_paths[index]) if index < len(layer_paths) else found
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
