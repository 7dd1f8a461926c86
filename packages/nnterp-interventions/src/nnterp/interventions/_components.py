"""Components, which are ablated, or send and receive in path patching: some heads and positions of a layer's value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from nnterp.defaults import plain_defaults
from nnterp.errors import Unavailable
from nnterp.indices import Indices, integer, integers, shown_slice
from nnterp.inputs import Row
from nnterp.interventions._engine import At, Edit, index_of, label_of, positions_axis, units_axis
from nnterp.interventions._layers import places_with
from nnterp.interventions._units import units_of
from nnterp.positions import Positions, plain_positions, resolve
from nnterp.values import get_value

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer


@dataclass(frozen=True)
class Component:
    """A value of one layer, or some heads and positions of it.

    Attributes:
        value: Name of a value, such as "attention_head_outputs" or "mlps_output".
        layer: Its layer; negative counts from the last. Of "features" also (layer, number), as `nnterp.attach` returns.
        heads: A head (or neuron, or expert of "expert_contributions") or several, or a slice of them; all if None.
        positions: Over each prompt's own tokens: indices, selectors or a list of these; all if None.

    Raises:
        TypeError: The layer, heads or positions are something else: a float, a boolean, a text.
        ValueError: Heads or positions are empty.

    Example:
        head = Component("attention_head_outputs", 4, heads=1, positions=-1)
        changed = ablate(model, prompts, head, "zero")["scores"]  # [prompts, 1]
    """

    value: str
    layer: At
    heads: int | slice | tuple[int, ...] | None = None
    positions: Positions = None

    def __post_init__(self) -> None:
        heads = integers(self.heads, "Component(heads)")
        if self.value == "features" and isinstance(self.layer, tuple):
            if len(self.layer) != 2:
                raise ValueError(f"Component(layer)={self.layer!r}: give (layer, number of the dictionary).")
            pair = (integer(entry, "Component(layer) holds a value that") for entry in self.layer)
            object.__setattr__(self, "layer", tuple(pair))
        else:
            object.__setattr__(self, "layer", integer(self.layer, "Component(layer)"))
        object.__setattr__(self, "heads", tuple(heads) if isinstance(heads, list) else heads)
        object.__setattr__(self, "positions", plain_positions(self.positions, "Component(positions)"))

    def __str__(self) -> str:
        unit = "expert" if self.value.startswith("expert_") else "head"
        if isinstance(self.heads, slice):
            heads = f" {unit}s {shown_slice(self.heads)}"
        else:
            listed = (self.heads,) if isinstance(self.heads, int) else self.heads or ()
            heads = f" {unit}{'s' if len(listed) > 1 else ''} {', '.join(map(str, listed))}" if listed else ""
        at = "" if self.positions is None else f" at {self.positions}"
        return f"{label_of(self.value, self.layer)}{heads}{at}"


@plain_defaults()
def components(
    model: StandardizedTransformer,
    value: str,
    layers: Indices = None,
    heads: Any = None,
    positions: Positions = None,
) -> list[Component]:
    """Make one component for each layer, or for each head of each layer: a list to sweep over with `ablate`.

    Args:
        model: The model.
        value: Name of the value.
        layers: The layer or layers; all that have the value if None. Of "features" also the index of a dictionary, as
            `nnterp.attach` returns it, or a list of these.
        heads: One component for each of these heads (or neurons): indices, or "all". None for one component a layer.
        positions: As in `Component`, the same for all.

    Returns:
        The components, by layer, and by head within a layer.

    Raises:
        ValueError: The value is not per layer, or has no axis that was asked for.
        IndexError: There is no such layer or head.
        Unavailable: The model, or a layer that was asked for, does not have the value.

    Example:
        print(len(components(model, "attention_head_outputs", heads="all")))  # → 32
    """
    chosen = places_with(model, [value], layers)
    heads = integers(heads, "heads") if heads is not None and not isinstance(heads, str) else heads
    positions = plain_positions(positions)
    return [
        Component(value, layer, unit, positions)
        for layer in chosen
        for unit in units_of(model, [value], heads, [layer])
    ]


def check(model: StandardizedTransformer, component: Any) -> Component:
    """The component with its layer and heads as indices from 0.

    Raises:
        TypeError: It is not a Component.
        ValueError, IndexError, Unavailable: The model does not have it.
    """
    if not isinstance(component, Component):
        raise TypeError(f"A Component was expected, such as Component('mlps_output', 3), not {component!r:.80}.")
    value = get_value(component.value)
    if not value.per_layer:
        raise ValueError(f"{value.name} is not a value of layers; take one that is, such as layers_output.")
    if value.of_encoder:
        raise Unavailable(
            f"{value.name} has the positions of the encoder's input, and components those of the decoder's: patch it "
            "with activation_patching, or write it in a trace."
        )
    positions_axis(component.value)
    at = component.layer
    (layer,) = places_with(model, [value.name], [at] if isinstance(at, tuple) else at)
    heads = component.heads
    if heads is not None:
        heads = tuple(u for u in units_of(model, [component.value], heads, [layer]) if u is not None)
        units_axis(component.value)
    return Component(component.value, layer, heads, component.positions)


def edit_of(component: Component, at: tuple[int, ...], new: Any) -> Edit:
    """The edit that replaces a (checked) component by `new` at positions `at`."""
    heads = component.heads
    assert not isinstance(heads, slice), "check() replaces a slice by what it selects"
    return Edit(component.value, component.layer, at, new, (heads,) if isinstance(heads, int) else heads)


def positions_of(model: StandardizedTransformer, component: Component, prompt: Row, label: str) -> tuple[int, ...]:
    """The component's positions in one prompt.

    Raises:
        ValueError: It has none there.
    """
    at = resolve(model, prompt, component.positions, label)
    if not at:
        raise ValueError(f"{component} has no position in {label}.")
    return at


def cut(component: Component, at: tuple[int, ...], whole: torch.Tensor) -> torch.Tensor:
    """The part of a value of one run, `[seq, ...]`, that a component means at positions `at`."""
    return whole[index_of(edit_of(component, at, whole), 0, whole.device)]
