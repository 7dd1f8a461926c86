"""The accessors of a model with the methods that those of 1.x had."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nnterp.table import get_value
from nnterp.traced import LayerAccessor, ModuleListAccessor

if TYPE_CHECKING:
    from nnsight import Envoy


class OlderLayerAccessor(LayerAccessor):
    """`LayerAccessor` with `get_module` and `returns_tuple`. A remote request carries a plain `LayerAccessor`."""

    def get_module(self, layer: int) -> Envoy:
        """Look up the module whose part the value is: the layer, or the attention, feed-forward or mixer in it.

        Returns:
            Its envoy.

        Raises:
            IndexError: The model has no such layer.
            Unavailable: The layer has no such part, or it is no module of its own.
        """
        role = get_value(self._value.name).role
        if role == "layer":
            return self._model.envoy(self._model.layer_paths[range(len(self))[layer]])
        return ModuleListAccessor(self._model, role, self._value.name)[layer]

    @property
    def returns_tuple(self) -> bool | None:
        """Whether the layers return the stream in a tuple.

        None for values that are not `layers_output`, and while it is unproven (`check_renaming=False`).
        """
        returns = self._model.readout.returns
        return returns[0] is not None if returns and self._value.name == "layers_output" else None

    def __reduce__(self) -> tuple[Any, ...]:
        return LayerAccessor, (self._model, self._value)


class OlderModuleListAccessor(ModuleListAccessor):
    """`ModuleListAccessor` with `get_module` and `returns_tuple`."""

    def get_module(self, layer: int) -> Envoy:
        """The module, as `accessor[layer]`."""
        return self[layer]

    @property
    def returns_tuple(self) -> None:
        """None: a module is no value."""
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return ModuleListAccessor, (self._model, self._role, self._name)
