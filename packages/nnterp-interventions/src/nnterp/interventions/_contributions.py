"""What path patching sends, receives and holds still: what each part of a layer adds to the stream.

A module's output is not always what its part adds: BLOOM's and MPT's attention and feed-forward add the stream
themselves before they return, so holding their outputs would hold the stream itself.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias

from nnterp.errors import Unavailable
from nnterp.interventions._components import Component
from nnterp.interventions._engine import At, layer_of

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer

Written: TypeAlias = tuple[str, At]  # a value's name and its layer

_OUTPUTS = {"mixer": "mixers_output", "self_attn": "attentions_output", "mlp": "mlps_output"}
_CONTRIBUTIONS = {
    "mixer": "mixer_contributions",
    "self_attn": "attention_contributions",
    "mlp": "mlp_contributions",
}


def held_parts(model: StandardizedTransformer, layers: Iterable[int], received: Collection[Written]) -> list[Written]:
    """The values that are held still in these layers: everything that is added to the stream there.

    Args:
        model: The model.
        layers: The layers.
        received: Names and layers of the receivers, as `as_contribution` makes them.

    Raises:
        Unavailable: It is not known what a layer adds to the stream, or a receiver is one of two mixers' contributions.
    """
    held: list[Written] = []
    for layer in layers:
        block, structure = model.anatomy.blocks[layer], model.facts.residual_of(layer)
        if structure.kind == "unknown":
            raise Unavailable(
                f"Layer {layer} of {model.anatomy.model_class}: it is not known what its parts add to the stream "
                f"({structure.reason}), so they cannot be held still: path patching is not served there."
            )
        roles = [role for role in ("mixer", "mlp") if getattr(block, role) is not None]
        if block.self_attn is not None and block.self_attn != block.mixer:
            roles.append("self_attn")
        for role in roles:
            whole = (_CONTRIBUTIONS[role], layer)
            if whole in received and len(roles) > 2:
                raise Unavailable(
                    f"{whole[0]}[{layer}] is no receiver: the layer has two mixers, whose outputs are held one by one. "
                    f"Take {_OUTPUTS[role]!r} instead."
                )
            held.append(whole if whole in received else _held(model, layer, role))
        if structure.other is not None:
            held.append(("other_contributions", layer))
    return held


def as_contribution(model: StandardizedTransformer, component: Component) -> Component:
    """A sender or receiver that is a whole part's output, as what that part adds where its module adds the stream."""
    role = _role(model, component)
    if component.value in _CONTRIBUTIONS.values():
        return replace(component, value=_CONTRIBUTIONS[role])
    if component.value in _OUTPUTS.values():
        return replace(component, value=_held(model, layer_of(component.layer), role)[0])
    return component


def check_sender(model: StandardizedTransformer, component: Component) -> None:
    """Raise unless the part that a sender belongs to adds something to the stream.

    Raises:
        Unavailable: It does not (Zamba's attention writes into its Mamba), or it is not known what it adds.
    """
    model.place(_CONTRIBUTIONS[_role(model, component)], component.layer)


def writes_at(model: StandardizedTransformer, component: Component) -> set[Written]:
    """The values through which a sender writes into the stream; in the sender's row they are not held still."""
    role = _role(model, component)
    return {(_OUTPUTS[role], component.layer), (_CONTRIBUTIONS[role], component.layer)}


def _role(model: StandardizedTransformer, component: Component) -> str:
    """The part that a component belongs to; the attention is the mixer unless the layer has another one."""
    block = model.anatomy.blocks[layer_of(component.layer)]
    if component.value.startswith("mlp"):
        return "mlp"
    return "self_attn" if component.value.startswith("attention") and block.self_attn != block.mixer else "mixer"


def _held(model: StandardizedTransformer, layer: int, role: str) -> Written:
    """Where one part of a layer is held: its module's output, or what it adds where the module adds the stream."""
    structure, part = model.facts.residual_of(layer), model.anatomy.part(role, layer)
    added = structure.mlp if role == "mlp" else structure.mixer
    inside = added is not None and any(term.path.startswith(f"{part.exit}.") for term in added.terms)
    return (_CONTRIBUTIONS if inside and not part.leaves else _OUTPUTS)[role], layer
