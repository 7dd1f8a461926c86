"""Reading and editing several values in one forward pass, each when the pass comes to it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from nnterp.interventions._edits import Edit, apply_edits
from nnterp.record import Record
from nnterp.values import Site, Sum, get_label, get_value, read_value, reads, when, write_value

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer

Key = tuple[str, int | None]


class Step(Record):
    """Something to do in a forward pass.

    Attributes:
        key: A value's name and layer.
        term: Which of the tensors that make up the value is read and held until the last of them is there; None where
            the value itself is there to be read and edited.
    """

    def __init__(self, key: Key, term: int | None = None) -> None:
        self.key, self.term = key, term


def forward_steps(model: StandardizedTransformer, keys: Iterable[Key]) -> list[Step]:
    """Values of layers in the order in which a forward pass comes to them, each once; parts of sums on the way."""
    once = list(dict.fromkeys(keys))
    layers = [layer for _, layer in once]
    by_rank = [Step(key) for key in sorted(once, key=lambda key: _rank(model, key))]
    if len(set(layers)) == len(layers):  # no two values of one layer
        return by_rank
    # Which of two values of a layer comes first depends on the model: parallel blocks run their parts in any order, and
    # between the terms of a sum other values may be passed.
    steps: list[tuple[float, bool, tuple[int, float], Step]] = []
    try:
        for key in once:
            ticks = [when(model, place) for place in reads(model, model.place(key[0], key[1]))[0]]
            rank = _rank(model, key)
            steps += [(tick, True, rank, Step(key, term)) for term, tick in enumerate(ticks[:-1])]
            steps.append((max(ticks), False, rank, Step(key)))
    except (KeyError, TypeError):  # a value that the probe did not pass
        return by_rank
    # What a tensor is changed to counts for the sums that are made of it, so it is held after it is edited.
    return [step for *_, step in sorted(steps, key=lambda entry: entry[:3])]


def forward_order(model: StandardizedTransformer, keys: Iterable[Key]) -> list[Key]:
    """Values of layers in the order in which a forward pass comes to them, each once."""
    return [step.key for step in forward_steps(model, keys) if step.term is None]


class Passing:
    """The values of a running forward pass, taken in the order of `forward_steps`; to be made inside of the trace."""

    def __init__(self, model: StandardizedTransformer) -> None:
        self.model = model
        self.held: dict[Key, list[torch.Tensor]] = {}

    def streams_first(self, name: str) -> bool:
        """Whether the model keeps several streams, all in `[streams, batch, seq, hidden]`."""
        return name in ("layers_input", "layers_output") and self.model.readout.layout.batch == 1

    def hold(self, step: Step) -> None:
        """Keep one of the tensors that a value is made of."""
        name, layer = step.key
        assert step.term is not None
        terms, _ = reads(self.model, self.model.place(name, layer))
        self.held.setdefault(step.key, []).append(terms[step.term].read(self.model, f"{name}[{layer}]"))

    def read(self, key: Key) -> torch.Tensor:
        """A value, once its last tensor is there; streams side by side come after the positions."""
        name, layer = key
        if self.streams_first(name):
            return read_value(self.model, get_label(name), layer).movedim(0, 2)
        if key not in self.held:
            return read_value(self.model, get_label(name), layer)
        terms, combine = reads(self.model, self.model.place(name, layer))
        return combine([*self.held[key], terms[-1].read(self.model, f"{name}[{layer}]")])

    def write(self, key: Key, edits: list[tuple[int, Edit]], size: tuple[int, int], offset: int) -> torch.Tensor:
        """Put edits of one value into the pass; returns what the value is now."""
        name, layer = key
        place = self.model.place(name, layer)
        current = self.read(key)
        new = apply_edits(current, edits, size, offset)
        if not isinstance(place, Sum):
            kept = new.movedim(2, 0) if self.streams_first(name) else new
            write_value(self.model, get_label(name), kept, layer)
            return new
        # The terms are passed one after the other: the last of them takes what changes.
        path, factor = place.terms[-1]
        site, label = Site(path, "output"), f"{name}[{layer}]"
        last = site.read(self.model, label)
        change = (new - current).to(last)
        change = change / factor.to(last) if isinstance(factor, torch.Tensor) else change / factor
        site.write(self.model, last + change.view(last.shape), label)
        return new


def _rank(model: StandardizedTransformer, key: Key) -> tuple[int, float]:
    value = get_value(key[0])
    if key[1] is None:
        return (-1 if value.rank == 0 else model.num_layers, value.rank)
    return key[1], value.rank
