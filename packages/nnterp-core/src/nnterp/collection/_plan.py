"""What to read, and in which order the model passes it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from nnterp.errors import Unavailable
from nnterp.named_transformer import NamedTransformer
from nnterp.traced import Place, layer_index
from nnterp.values import Combine, Value, canonical, reads, when


@dataclass(frozen=True)
class Target:
    """One value at one layer: the reads it is made of, by their place in the plan, and how they are put together."""

    value: Value
    layer: int | None
    parts: tuple[int, ...]
    combine: Combine

    @property
    def label(self) -> str:
        """How errors call it."""
        return self.value.name if self.layer is None else f"{self.value.name}[{self.layer}]"


@dataclass(frozen=True)
class Plan:
    """Reads in forward order, and the targets that are complete after each.

    Attributes:
        reads: The places to read, in the order the model passes them.
        targets: What they make.
        after: For each read, the targets that it completes.
        last_use: For each read, the reads that nothing needs any more after it.
        layers: Value → its layers, in the order asked for.
    """

    reads: tuple[Place, ...]
    targets: tuple[Target, ...]
    after: tuple[tuple[int, ...], ...]
    last_use: tuple[tuple[int, ...], ...]
    layers: dict[str, tuple[int, ...]]


def make_plan(model: NamedTransformer, values: str | Iterable[str], layers: int | Iterable[int] | None) -> Plan:
    """Look up where everything asked for is served and put it in forward order.

    Raises:
        ValueError: There is no such value, or nothing was asked for.
        IndexError: There is no such layer.
        Unavailable: A layer that was asked for does not have the value.
    """
    wanted = [values] if isinstance(values, str) else list(values)
    if not wanted:
        raise ValueError("No values were asked for; see model.values for what there is.")
    asked: dict[str, list[int]] = {}
    rows: dict[str, Value] = {}
    for name in wanted:
        value, named = canonical(name)
        if value.name == "mixer_states":
            raise ValueError("mixer_states have no positions, and belong to a run with a cache: read them in a trace.")
        rows[value.name] = value
        mine = asked.setdefault(value.name, [])
        if not value.per_layer:
            continue
        chosen = (
            [layer_index(named, model.num_layers, value.name)] if named is not None else _layers(model, value, layers)
        )
        mine.extend(layer for layer in chosen if layer not in mine)

    places: dict[Place, float] = {}
    made: list[tuple[Value, int | None, list[Place], Combine]] = []
    for name, mine in asked.items():
        value = rows[name]
        for layer in mine if value.per_layer else [None]:
            parts, combine = reads(model, model.place(value.name, layer))
            for part in parts:
                if part not in places:
                    places[part] = when(model, part)
            made.append((value, layer, parts, combine))
    order = sorted(places, key=places.__getitem__)
    index = {place: i for i, place in enumerate(order)}
    targets = tuple(Target(v, i, tuple(index[p] for p in parts), combine) for v, i, parts, combine in made)
    after: list[list[int]] = [[] for _ in order]
    for i, target in enumerate(targets):
        after[max(target.parts)].append(i)
    needed = {p: max(max(t.parts) for t in targets if p in t.parts) for p in range(len(order))}
    last_use = tuple(tuple(p for p, at in needed.items() if at == i) for i in range(len(order)))
    layers_of = {name: tuple(mine) for name, mine in asked.items()}
    return Plan(tuple(order), targets, tuple(tuple(a) for a in after), last_use, layers_of)


def _layers(model: NamedTransformer, value: Value, layers: int | Iterable[int] | None) -> list[int]:
    """The layers asked for; by default all that have the value."""
    if layers is not None:
        given: list[int] = list(layers) if isinstance(layers, Iterable) else [layers]
        if not given:
            raise ValueError("layers is empty; leave it out for all layers.")
        return model.layers_of_texts(layer_index(layer, model.num_layers, value.name) for layer in given)
    found, reason = [], None
    for layer in model.layers_of_texts():
        try:
            model.place(value.name, layer)
            found.append(layer)
        except Unavailable as error:
            reason = error
    if not found and reason is not None:
        raise reason
    return found
