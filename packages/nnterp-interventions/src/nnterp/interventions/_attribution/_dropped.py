"""Backward passes in which one layer's contribution to the stream has no gradient (AtP*, section 3.1.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from nnterp.errors import Unavailable
from nnterp.interventions._attribution._terms import Factor, structure_of, times
from nnterp.interventions._engine import Key
from nnterp.traced import Place
from nnterp.values import get_value, reads

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer

_BETWEEN = ("layers_input", "layers_output", "layers_mid")  # per layer, and not inside of one
_REFUSED = ("layers_mid", "features")


class Gates:
    """A gate behind each layer: it returns what leaves the layer, and chooses the way that the gradient goes back.

    Args:
        model: The model; it is certified.
        names: The values whose gradients are wanted.
        what: The function and argument that need them, for errors.

    Attributes:
        layers: The layers that have one.
        dropped: The layer whose contribution to the stream has no gradient in the next backward pass.

    Raises:
        Unavailable: The stream is not what enters a layer plus what the layer adds, or a value stands where it cannot
            be told whether it belongs to the layer; says which.
    """

    def __init__(self, model: StandardizedTransformer, names: list[str], what: str) -> None:
        if not model.readout.layout.plain:
            raise Unavailable(f"{what} needs one residual stream, and {model.model_class} keeps several side by side.")
        if model.facts.only_with_image:
            raise Unavailable(f"{what} is not served for {model.model_class}: some of its layers run only with images.")
        for name in names:
            if name in _REFUSED:
                raise Unavailable(
                    f"{what} is not served for {name}, which may stand in the middle of a layer's contribution. Take "
                    "layers_input, layers_output, or what a layer's parts compute and add."
                )
        self.layers = list(range(model.num_layers))
        if len(self.layers) < 2:
            raise Unavailable(f"{what} averages over the other layers, and {model.model_class} has only one.")
        self.scales: list[Factor] = [structure_of(model, layer, what).stream_scale for layer in self.layers]
        self.begin = {self._place(model, "layers_input", layer, what): layer for layer in self.layers}
        self.end = {self._place(model, "layers_output", layer, what): layer for layer in self.layers}
        self.entering: dict[int, torch.Tensor] = {}
        self.dropped: int | None = None

    @property
    def keys(self) -> list[Key]:
        """The values that are read to set the gates."""
        return [(name, layer) for layer in self.layers for name in ("layers_input", "layers_output")]

    @staticmethod
    def _place(model: StandardizedTransformer, name: str, layer: int, what: str) -> Place:
        places, _ = reads(model, model.place(name, layer))
        if len(places) != 1:
            raise Unavailable(f"{what} is not served for {model.model_class}: its {name} are made of several tensors.")
        return places[0]

    def passed(self, model: Any, place: Place, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """What a place holds once the gate stands; called in a trace with all that is read, in forward order."""
        if place in self.begin:
            self.entering[self.begin[place]] = tensor
        layer = self.end.get(place)
        if layer is None:
            return tensor
        made = _Gate.apply(self.entering.pop(layer), tensor, self, layer)
        place.write(model, made, name)
        return made


class _Gate(torch.autograd.Function):
    """What leaves a layer. Its gradient goes to the layer, or past it to what enters, if the layer is dropped."""

    @staticmethod
    def forward(ctx: Any, entering: torch.Tensor, leaving: torch.Tensor, gates: Gates, layer: int) -> torch.Tensor:
        ctx.gates, ctx.layer = gates, layer
        return leaving.clone()  # the model may edit it in place

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        if ctx.gates.dropped == ctx.layer:
            return times(gradient, ctx.gates.scales[ctx.layer]), None, None, None
        return None, gradient, None, None


def lies_inside(name: str) -> bool:
    """Whether a value acts on the stream only through its own layer's contribution."""
    value = get_value(name)
    return value.per_layer and value.stack in ("layers", "cross") and name not in _BETWEEN
