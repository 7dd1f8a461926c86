"""Values that a model's own code edits in place after they were computed: who reads one keeps what was read."""

from __future__ import annotations

from nnterp.errors import Unavailable
from nnterp.facts import Facts
from nnterp.record import replace
from nnterp.traced import EditedLater, Everywhere, InRun, Place, ReadOnly, Site, Sum, SumEditedLater, ThroughOut, View


def as_it_was_read(facts: Facts, place: Place) -> Place:
    """The place, at which the model goes on with a copy of what is read if it would edit that.

    Raises:
        Unavailable: It is what a module is given, which the code that calls the module holds too, and edits later.
    """
    edited = facts.edited_later | facts.assumed.edited
    if not edited:
        return place
    if isinstance(place, Site) and place.side == "input" and (place.path, "input") in edited:
        raise Unavailable(f"{facts.anatomy.model_class} edits {place} in place later, so what is read would change.")
    if isinstance(place, Site):
        return EditedLater(place.path, place.side) if (place.path, place.side) in edited else place
    if isinstance(place, Sum):
        own = any((path, "output") in edited for path, _ in place.terms)
        return SumEditedLater(place.terms, place.constant) if own else place
    if isinstance(place, Everywhere):
        return Everywhere(tuple(as_it_was_read(facts, one) for one in place.places))
    if isinstance(place, ThroughOut):
        return replace(place, heads=as_it_was_read(facts, place.heads))
    if isinstance(place, (View, ReadOnly, InRun)):
        return replace(place, place=as_it_was_read(facts, place.place))
    return place
