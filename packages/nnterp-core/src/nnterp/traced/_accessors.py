"""Reading and writing values inside a trace: `model.layers_output[5]`, and the same for every row of the table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from nnsight.intervention.interleaver import OutOfOrderError

from nnterp.errors import OutsideTraceError, ShapeError
from nnterp.table import Label
from nnterp.traced._places import Site, bare
from nnterp.traced._sums import Sum
from nnterp.traced._views import reflattened, unflattened

if TYPE_CHECKING:
    from nnsight import Envoy

    from nnterp.table import Value
    from nnterp.traced._running import Place, Running


class LayerAccessor:
    """A per-layer value of a model, indexed by layer, readable and writable inside a trace.

    `model.layers_output[i]` is the tensor of layer `i` (negative indices count from the last layer), on the device and
    in the dtype the model computes it; assigning replaces it for the rest of the forward pass. In a model whose layers
    hold several attentions one after the other (LongCat-Flash), values of attention are indexed with the layer and the
    attention's number in it: `model.attention_head_outputs[i, 1]`. In a looped model `i` counts all runs of layers, and
    `model.layers_output[layer, pass]` names one. Features are indexed with the layer, with the layer and the
    dictionary's number in it, or with the value that the dictionary reads or writes.

    Raises (on indexing):
        IndexError: The model has no such layer.
        Unavailable: The layer has no such part.
        OutsideTraceError: No forward pass is running.
        OutOfOrderError: The forward pass is already past the value, or never computes it.
        ShapeError: The tensor written has another shape than what it replaces.
    """

    def __init__(self, model: Running, value: Label) -> None:
        self._model = model
        self._value = value

    def __getitem__(self, layer: int | tuple[int, int] | str) -> torch.Tensor:
        return read_value(self._model, self._value, layer)

    def __setitem__(self, layer: int | tuple[int, int] | str, tensor: torch.Tensor) -> None:
        write_value(self._model, self._value, tensor, layer)

    def __call__(self, layer: int) -> torch.Tensor:
        return self[layer]

    def __len__(self) -> int:
        return depth(self._model, self._value)

    def __iter__(self) -> Any:
        raise TypeError(f"{self._value.name} cannot be iterated over; index it: model.{self._value.name}[i].")

    def __repr__(self) -> str:
        return f"<{self._value.name}: {self._value.shape} of each of {len(self)} layers. {self._value.description}>"


class ModuleListAccessor:
    """The modules playing one part in each layer: `model.attentions[i]`, `model.mlps[i]`, `model.mixers[i]`."""

    def __init__(self, model: Running, role: str, name: str) -> None:
        self._model = model
        self._role = role
        self._name = name

    def __getitem__(self, layer: int) -> Envoy:
        index = layer_index(layer, self._model.num_layers, self._name)
        return self._model.envoy(self._model.module_path(self._role, index))

    def __call__(self, layer: int) -> Envoy:
        return self[layer]

    def __len__(self) -> int:
        return self._model.num_layers

    def __repr__(self) -> str:
        return f"<{self._name}: the {self._role} module of each layer that has one>"


def depth(model: Running, value: Label | Value) -> int:
    """Number of layers that have a value's kind."""
    return getattr(model, f"num_{value.stack}_layers", model.num_layers)


def layer_index(layer: int, num_layers: int, name: str) -> int:
    """A layer index as a position from 0, negative ones counted from the end.

    Raises:
        IndexError: Out of range.
        TypeError: Not an integer.
    """
    scalar = not getattr(layer, "ndim", 0) and "bool" not in str(getattr(layer, "dtype", type(layer)))
    try:
        index = layer.__index__() if scalar else None
    except (AttributeError, TypeError):  # tensors of floats have it and raise
        index = None
    if index is None:
        raise TypeError(f"{name}[{layer!r:.80}]: a layer is an integer from {-num_layers} to {num_layers - 1}.")
    if not -num_layers <= index < num_layers:
        raise IndexError(
            f"{name}[{index}]: the model has {num_layers} layers, so indices go from {-num_layers} to {num_layers - 1}."
        )
    return index % num_layers


def read_value(model: Running, value: Label | Value, layer: int | tuple[int, int] | str | None = None) -> torch.Tensor:
    """The tensor of one value in the running forward pass, live: an in-place edit of it edits the model's run.

    A value that is a sum or a multiple of what modules return is a new tensor; it has to be assigned to have an effect.
    """
    label, place = _locate(model, value, layer)
    try:
        tensor = place.read(model, label)
    except OutOfOrderError as error:
        _explain(error, label)
        raise
    if isinstance(bare(place), Site) and tensor.requires_grad and torch.is_grad_enabled():
        tensor.retain_grad()  # so that a plain `score.backward()` fills in its `.grad`
    return tensor if tensor.dim() >= value.axes else unflattened(model, tensor)


def write_value(
    model: Running, value: Label | Value, tensor: torch.Tensor, layer: int | tuple[int, int] | str | None = None
) -> None:
    """Replace one value in the running forward pass by `tensor`, of the same shape (else ShapeError)."""
    label, place = _locate(model, value, layer)
    try:
        if isinstance(bare(place), Sum):  # its first terms are passed when the last is reached: it does both in one go
            _require_tensor(tensor, label, "")
            place.write(model, tensor, label)
            return
        current = place.read(model, label)
        shown = current if current.dim() >= value.axes else unflattened(model, current)
        _require_tensor(tensor, label, f" of shape {list(shown.shape)}")
        if tensor.shape != shown.shape:
            raise ShapeError(
                f"{label} has shape {list(shown.shape)}; a tensor of shape {list(tensor.shape)} cannot replace it."
            )
        if tensor is not shown:
            tensor = tensor.to(device=current.device, dtype=current.dtype)
            place.write(model, tensor if shown is current else reflattened(model, tensor, current), label)
    except OutOfOrderError as error:
        _explain(error, label)
        raise


def _require_tensor(tensor: Any, label: str, shape: str) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(
            f"{label} is a tensor{shape}; it cannot be set to a {type(tensor).__name__}. "
            "Convert numbers and arrays with torch.as_tensor(...)."
        )


def _locate(model: Running, value: Label | Value, layer: int | tuple[int, int] | str | None) -> tuple[str, Place]:
    label = value.name
    index: int | tuple[int, int] | str | None = None
    if isinstance(layer, str) and value.name == "features":  # by the value that a dictionary reads or writes
        index, label = layer, f"features[{layer!r}]"
    elif isinstance(layer, tuple) and len(layer) == 2:  # a run of a layer, one of its attentions, or dictionaries
        label = f"{value.name}[{layer[0]}, {layer[1]}]"
        if model.runs is not None and value.name != "features":
            index = model.runs.index(layer, value.name)
        else:
            index = layer_index(layer[0], depth(model, value), value.name), layer[1]
    elif value.per_layer:
        if not depth(model, value):
            model.place(value.name, 0)  # says why there are none
        index = layer_index(layer, depth(model, value), value.name)  # type: ignore[arg-type]
        label = f"{value.name}[{layer}]"
    place = model.place(value.name, index)
    require_running(model, label)
    return label, place


def require_running(model: Running, label: str) -> None:
    """Raise unless a forward pass of `model` is running."""
    if not model.interleaver.interleaving:
        raise OutsideTraceError(
            f"{label} exists only while the model runs: read it inside `with model.trace(prompt):` "
            f"(and `.save()` it to keep it after the block)."
        )


# Puts this library's words in front; in place, because nnsight ends its loops by the error's identity.
def _explain(error: OutOfOrderError, label: str) -> None:
    error.args = (
        f"{label}: the forward pass is already past it, or never computes it. Read values in forward order (layer by "
        f"layer; input before attention before MLP before output), and none inside a skipped layer. [{error.args[0]}]",
        *error.args[1:],
    )
