"""What to read, and in which order the model passes it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from nnterp.collection._outputs import NEXT, OUTPUTS, Index, Predictions, label_of, named, only
from nnterp.errors import Unavailable
from nnterp.indices import integers, read_index, read_indices
from nnterp.named_transformer import NamedTransformer
from nnterp.traced import Place
from nnterp.values import Combine, Value, reads, stack_depth, when


@dataclass(frozen=True)
class Target:
    """One value at one layer: the reads it is made of, by their place in the plan, and how they are put together.

    Attributes:
        last: The value is read at each row's last token, whatever positions are asked for, and has no axis of them.
    """

    value: Value
    layer: Index | None
    parts: tuple[int, ...]
    combine: Combine

    @property
    def last(self) -> bool:
        """Whether it has no axis of positions, as the next token's probabilities have none."""
        return self.value.name == NEXT.name

    @property
    def label(self) -> str:
        """How errors call it."""
        return label_of(self.value.name, self.layer)


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
    layers: dict[str, tuple[Index, ...]]

    @property
    def of_encoder(self) -> bool:
        """Whether positions are those of the encoder's input.

        Raises:
            ValueError: Some values are of the encoder's positions and some of the decoder's.
        """
        sides = {target.value.of_encoder for target in self.targets}
        if len(sides) > 1:
            heard = sorted({t.value.name for t in self.targets if t.value.of_encoder})
            raise ValueError(
                f"{', '.join(heard)} have the positions of the encoder's input, and the other values those of the "
                "decoder's: collect them in two calls."
            )
        return sides.pop()


def make_plan(
    model: NamedTransformer, values: str | Iterable[str], layers: Any, outputs: bool = False, images: bool = False
) -> Plan:
    """Look up where everything asked for is served and put it in forward order.

    With `images`, every prompt has an image, and the layers are there that run only with one.

    A layer that is given twice in `layers` is twice in the result; a layer that two names ask for is there once.

    Returns:
        What to read, in forward order, and what is made of it.

    Raises:
        ValueError: There is no such value, or nothing was asked for.
        IndexError: There is no such layer.
        Unavailable: A layer that was asked for does not have the value.
    """
    wanted = value_names(values)
    layers = integers(layers, "layers")  # once, because several values may ask for them
    asked: dict[str, list[Index]] = {}
    rows: dict[str, Value] = {}
    for name in wanted:
        value, at = named(name, outputs)
        if value.name == "mixer_states":
            raise ValueError("mixer_states have no positions, and belong to a run with a cache: read them in a trace.")
        if value.stack == "vision":
            raise ValueError(f"{value.name} has no positions of a prompt's tokens: read it in a trace.")
        rows[value.name] = value
        mine = asked.setdefault(value.name, [])
        if not value.per_layer:
            continue
        chosen: Sequence[Index]
        if isinstance(at, tuple) and value.name != "features":
            at = _of_pass(model, name, at)
        if at is not None:
            first = at[0] if isinstance(at, tuple) else at
            first = read_index(first, stack_depth(model.facts, value), value.name, "layers")
            chosen = [first] if value.stack == "encoder" else model.layers_of_texts([first], images)
            chosen = [(first, at[1])] if isinstance(at, tuple) else chosen
        else:
            chosen = _layers(model, value, layers, images)
        there = tuple(mine)
        mine.extend(layer for layer in chosen if layer not in there)

    places: dict[Place, float] = {}
    predictions: Any = Predictions()
    made: list[tuple[Value, Index | None, list[Place], Combine]] = []
    for name, mine in asked.items():
        value = rows[name]
        for layer in dict.fromkeys(mine) if value.per_layer else [None]:
            if value.name in OUTPUTS:
                parts: list[Place] = [predictions]
                combine: Combine = only
                places[predictions] = float("inf")
            else:
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


def _of_pass(model: NamedTransformer, name: str, at: tuple[int, int]) -> int:
    runs = model.runs
    if runs is None:
        raise ValueError(
            f"{name} has two indices, and those of collect() are a layer and a dictionary of it, or a layer and a pass "
            f"of a looped model. {model.model_class} is not looped."
        )
    return runs.index(at, name.partition("[")[0])


def value_names(values: Any) -> list[str]:
    """The values asked for, by name.

    Raises:
        TypeError: They are no names.
        ValueError: There are none.
    """
    wanted = [values] if isinstance(values, str) else list(values) if isinstance(values, Iterable) else [values]
    for name in wanted:
        if not isinstance(name, str):
            raise TypeError(f"A value is asked for by its name, such as 'layers_output', not by {name!r:.80}.")
    if not wanted:
        raise ValueError("No values were asked for; see model.values for what there is.")
    return wanted


def _layers(model: NamedTransformer, value: Value, layers: Any, images: bool) -> list[int]:
    """The layers asked for; by default all that have the value and run on these prompts."""
    if value.stack == "encoder":
        every = range(stack_depth(model.facts, value))
        return list(every if layers is None else read_indices(layers, len(every), "layers", "layers"))
    if layers is not None:
        return model.layers_of_texts(read_indices(layers, model.num_layers, "layers", "layers"), images)
    found, reason = [], None
    for layer in model.layers_of_texts(images=images):
        try:
            model.place(value.name, layer)
            found.append(layer)
        except Unavailable as error:
            reason = error
    if not found and reason is not None:
        raise reason
    return found
