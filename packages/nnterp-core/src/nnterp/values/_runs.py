"""Values in layers that run several times: each place in the run of its modules that is the layer's own."""

from __future__ import annotations

from collections.abc import Iterator

from nnterp.facts import Facts
from nnterp.table import Value
from nnterp.traced import (
    CachedState,
    Declared,
    EveryExpert,
    Everywhere,
    Experts,
    InRun,
    Inside,
    Item,
    Place,
    ReadOnly,
    Routed,
    Runs,
    Site,
    State,
    Sum,
    ThroughOut,
    View,
)
from nnterp.values._images import missing

Location = tuple[str, tuple[str, ...]]  # a module's path, and the labels of an operation in it


def runs_of(facts: Facts) -> Runs | None:
    """Say which index each run of a layer of a looped model has; returns None for other models."""
    return Runs(facts.anatomy.runs) if facts.anatomy.runs else None


def unrolled(facts: Facts, layer: int, number: int | None = None) -> int | list[int]:
    """See `StandardizedTransformer.unrolled`.

    Returns:
        As that method.
    """
    runs = runs_of(facts) or Runs(tuple((index,) for index in range(facts.anatomy.num_layers)))
    if number is not None:
        return runs.index((layer, number), "unrolled")
    first = runs.index((layer, 0), "unrolled")
    return list(next(own for own in runs.of if own[0] == first))


def in_its_run(facts: Facts, value: Value, place: Place, layer: int | None) -> Place:
    """A place as it is served in one layer of a looped model; in other models, the place itself.

    Values that are not per layer are those of the last run: a final norm may also run between passes, or on embeddings.

    Raises:
        Unavailable: What makes the value does not run once in each run of the layer.
    """
    if not value.per_layer:
        turns = max((_times(facts, at) for at in locations(facts, place)), default=1)
        return place if turns == 1 else InRun(place, turns - 1 if value.rank else 0, turns)
    if not facts.anatomy.runs:
        return place
    block = facts.anatomy.blocks[layer or 0]
    for at in locations(facts, place):
        times = _times(facts, at)
        if times != block.turns:
            name = at[0] if not at[1] else f"{at[0]}.source.{'.source.'.join(at[1])}"
            reason = f"{name} runs {times} times in a forward pass, and the layer {block.turns} times"
            raise missing(f"Layer {block.index} of {facts.anatomy.model_class} has no {value.name}: {reason}.", reason)
    return place if block.turns == 1 else InRun(place, block.turn, block.turns)


def _times(facts: Facts, at: Location) -> int:
    """How often something runs in a forward pass."""
    path, labels = at
    if not labels:
        return facts.repeated[path] if path in facts.repeated else len(_turns(facts).get(at, (0,)))
    if at in _turns(facts):
        return len(_turns(facts)[at])
    proven = [place for place in facts.between if place is not None and (place.path, place.labels) == at]
    return max(1, len(proven))


def _turns(facts: Facts) -> dict[Location, tuple[tuple[int, int], ...]]:
    return {} if facts.look_inside is None or not facts.anatomy.runs else facts.inside.turns


def locations(facts: Facts, place: Place) -> Iterator[Location]:
    """The modules and operations at which a place reads and writes."""
    if isinstance(place, (Site, Item, CachedState, Routed, Experts, EveryExpert)):
        yield place.path, ()
    elif isinstance(place, Inside):
        yield place.path, place.labels
    elif isinstance(place, Sum):
        yield from ((path, ()) for path, _ in place.terms)
    elif isinstance(place, Everywhere):
        for one in place.places:
            yield from locations(facts, one)
    elif isinstance(place, ThroughOut):
        yield from locations(facts, place.heads)
        yield place.path, ()
    elif isinstance(place, (View, ReadOnly, State, InRun)):
        yield from locations(facts, place.place)
    elif isinstance(place, Declared):
        yield facts.anatomy.part("self_attn", place.layer).entry, ()
