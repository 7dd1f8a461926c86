"""In which order values are passed in a forward, so that they can be asked for in any."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from nnterp.values._places import Everywhere, Inside, Item, Place, Site, Sum, View, added, scaled
from nnterp.values._serve import Declared, ReadOnly, ThroughOut, findings, through

if TYPE_CHECKING:
    from nnterp.standardized_transformer import StandardizedTransformer

Combine = Callable[[Sequence[torch.Tensor]], torch.Tensor]


def reads(model: StandardizedTransformer, place: Place) -> tuple[list[Place], Combine]:
    """The tensors of the model that a value is made of, and how: a sum's terms are passed at different times."""
    if isinstance(place, View):
        inner, combine = reads(model, place.place)
        return inner, lambda given: place.show(combine(given))
    if isinstance(place, Everywhere):
        return reads(model, place.places[0])
    if isinstance(place, ReadOnly):
        return reads(model, place.place)
    if isinstance(place, ThroughOut):
        inner, combine = reads(model, place.heads)
        return inner, lambda given: through(model._module.get_submodule(place.path), combine(given), model)
    if isinstance(place, Sum):
        factors = [factor for _, factor in place.terms]
        sites: list[Place] = [Site(path, "output") for path, _ in place.terms]
        return sites, lambda given: added([scaled(t, f) for t, f in zip(given, factors, strict=True)])
    return [place], lambda given: given[0]


def when(model: StandardizedTransformer, place: Place) -> float:
    """When a place is passed, in ticks of the probe.

    Raises:
        KeyError: The probe never passed it.
    """
    ticks = findings(model).ticks
    if isinstance(place, Site):
        return ticks[place.path, (), place.side]
    if isinstance(place, Item):
        return ticks[place.path, (), "output"]
    if isinstance(place, Inside):
        return ticks[place.path, place.labels, place.side]
    if isinstance(place, Declared):
        part = model.anatomy.part("self_attn", place.layer)
        return ticks[part.entry, (), "output"] - 0.5
    raise TypeError(f"{type(place).__name__} is made of other places; ask for those.")
