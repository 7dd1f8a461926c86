"""In which order a forward pass computes values, so that library functions can take them in any order."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast

import torch

from nnterp.errors import Unavailable
from nnterp.traced import (
    Declared,
    EveryExpert,
    Everywhere,
    Experts,
    Features,
    Given,
    InRun,
    Inside,
    Item,
    ReadOnly,
    Routed,
    Site,
    Sum,
    ThroughOut,
    View,
    added,
    counted,
)
from nnterp.values._lookup import Known

if TYPE_CHECKING:  # what a function names travels with it in a remote request
    from nnterp.traced import Place, Running

Combine = Callable[[Sequence[torch.Tensor]], torch.Tensor]


# A sum's terms are computed at different times, so a block that reads values in any order reads them one by one.
# Returns places whose tensors are the model's own, and the function from these tensors to the value.
def reads(model: Known, place: Place) -> tuple[list[Place], Combine]:
    """Split a place into the tensors to read and a function that combines them."""
    if isinstance(place, View):
        inner, combine = reads(model, place.place)
        return inner, lambda given: place.layout.show(combine(given))
    if isinstance(place, InRun):
        inner, combine = reads(model, place.place)
        return [InRun(part, place.turn, place.turns) for part in inner], combine
    if isinstance(place, Everywhere):
        return reads(model, place.places[0])
    if isinstance(place, ReadOnly):
        return reads(model, place.place)
    if isinstance(place, ThroughOut):
        inner, combine = reads(model, place.heads)
        return inner, lambda given: place.through(cast("Running", model), combine(given))
    if isinstance(place, Sum):
        return [place.kind(path, "output") for path, _ in place.terms], place.total
    if (read_place := getattr(place, "read_place", None)) is not None:  # a request without `Features` does without them
        inner, combine = reads(model, read_place)
        return inner, lambda given: place.encode(place.flat(combine(given), place.axes))  # type: ignore[attr-defined]
    return [place], lambda given: given[0]


def when(model: Known, place: Place) -> float:
    """When a forward pass reaches a place, on the clock of the probe.

    Raises:
        KeyError: The probe never reached it.
        TypeError: It is made of other places.
    """
    ticks = model.facts.inside.ticks
    if isinstance(place, InRun):
        return _in_run(model, place)
    if isinstance(place, Site) and place.path == model.facts.anatomy.ln_final:
        return math.inf  # after the last layer, with which the probe ends
    if isinstance(place, Site):
        key = place.path, (), place.side
        return ticks[key] if key in ticks else _with_image(model, place)
    if isinstance(place, Given | Routed | Experts):
        return ticks[place.path, (), "input"]
    if isinstance(place, Item | EveryExpert):
        return ticks[place.path, (), "output"]
    if isinstance(place, Inside):
        # The probe does not time the operations of every module. One that it does not is `layers_mid` in a module that
        # ends with it: it comes after everything in that module.
        known = ticks.get((place.path, place.labels, place.side))
        return ticks[place.path, (), "output"] - 0.5 if known is None else known
    if isinstance(place, Declared):
        part = model.facts.anatomy.part("self_attn", place.layer)
        return ticks[part.entry, (), "output"] - 0.5
    raise TypeError(f"{type(place).__name__} is made of other places; ask for those.")


def _in_run(model: Known, place: InRun) -> float:
    """When a pass reaches one run of a looped layer's modules.

    Raises:
        KeyError: The probe never reached it.
    """
    inner, runs = place.place, model.facts.inside.turns
    if isinstance(inner, Site) and inner.path == model.facts.anatomy.ln_final and place.turn == place.turns - 1:
        return math.inf
    key = (inner.path, inner.labels if isinstance(inner, Inside) else ())  # type: ignore[attr-defined]
    if key not in runs:  # `layers_mid` in a module that ends with it
        return runs[key[0], ()][place.turn][1] - 0.5
    side = "input" if isinstance(inner, Given | Routed | Experts) else getattr(inner, "side", "output")
    return runs[key][place.turn][side == "output"]


def _with_image(model: Known, place: Site) -> float:
    """When a pass reaches a place in a layer that runs only with an image: just after the last layer before it that
    the text probe ran.

    Raises:
        KeyError: No run with an image reached it either.
    """
    vision, ticks, blocks = model.facts.vision, model.facts.inside.ticks, model.facts.anatomy.blocks
    if vision is None:
        raise KeyError((place.path, (), place.side))
    now, base, began = vision.ticks[place.path, (), place.side], 0.0, 0
    for block in blocks:
        left = block.path, (), "output"
        if left in ticks and vision.ticks[left] < now:
            base, began = ticks[left], vision.ticks[left]
    return base + (now - began) * 1e-6


def gradient_reads(model: Known, place: Place, label: str) -> tuple[list[Place], Combine]:
    """The tensors whose gradients make the gradient with respect to a value, and how.

    A view takes the gradient of what it is a view of; a value computed several times over, the sum; a multiple that is
    added to the stream, the gradient of what is multiplied, divided by the factor; a head's contribution, the gradient
    of what the contributions are summed into; a feature, that of what it is decoded into, along its direction. What an
    expert returns takes the gradient of the experts' sum, times its weight: the function is also given what is read at
    `gradient_factors`.

    Returns:
        The places, and the function from the gradients with respect to them, in their order, and then from what is
        read at `gradient_factors`.

    Raises:
        Unavailable: The value is passed on in two places, of which only one is served.
    """
    if isinstance(place, InRun):
        inner, combine = gradient_reads(model, place.place, label)
        return [InRun(part, place.turn, place.turns) for part in inner], combine
    if isinstance(place, View):
        inner, combine = gradient_reads(model, place.place, label)
        return inner, lambda given: place.layout.show(combine(given))
    if isinstance(place, Everywhere):
        pieces = [gradient_reads(model, p, label) for p in place.places]
        return [p[0][0] for p in pieces], lambda given: added([f([g]) for g, (_, f) in zip(given, pieces, strict=True)])
    if isinstance(place, ThroughOut):
        attentions = model.facts.inside.attention
        heads = next(a.out_heads for a in attentions if a is not None and a.out == place.path)
        assert heads is not None
        return [Site(place.path, "output")], lambda given: given[0].unsqueeze(2).expand(-1, -1, heads, -1)
    if isinstance(place, Features):
        inner, combine = gradient_reads(model, place.write_place, label)
        return inner, lambda given: place.slopes(place.flat(combine(given), place.write_axes))
    if isinstance(place, Sum):
        path, factor = place.terms[-1]
        return [
            place.kind(path, "output")
        ], lambda given: given[0] / (factor.to(given[0]) if isinstance(factor, torch.Tensor) else factor)
    if isinstance(place, Routed | Experts | EveryExpert):
        return _of_experts(model, place)
    if isinstance(place, ReadOnly):
        raise Unavailable(
            f"There is no gradient with respect to {label} in {model.facts.anatomy.model_class}: {place.reason}."
        )
    return [place], lambda given: given[0]


def gradient_factors(place: Place) -> list[Place]:
    """What the function of `gradient_reads` needs beside gradients: where the weights of experts are read."""
    if isinstance(place, InRun):
        return [InRun(factor, place.turn, place.turns) for factor in gradient_factors(place.place)]
    if isinstance(place, Experts) and place.which == "outputs":
        return [Given(place.path, place.keys[2])]
    return []


def _of_experts(model: Known, place: Routed | Experts | EveryExpert) -> tuple[list[Place], Combine]:
    """See `gradient_reads`. Positions may still share an axis with the batch, as in the model's own tensors."""
    if isinstance(place, Routed):
        return [Given(place.path, place.key)], lambda given: given[0] / place.factor
    returned: list[Place] = [Site(place.path, "output")]
    if isinstance(place, Experts) and place.which == "outputs":
        return returned, lambda given: given[0].flatten(0, -2)[:, None] * given[1].to(given[0])[..., None]
    experts = counted(cast("Running", model), place.path, place.count)
    if isinstance(place, EveryExpert):
        return returned, lambda given: given[0].unflatten(0, (experts, -1)).transpose(0, 1)
    factor = place.factor
    return returned, lambda given: (given[0].flatten(0, -2) / factor)[:, None].expand(-1, experts, -1)
