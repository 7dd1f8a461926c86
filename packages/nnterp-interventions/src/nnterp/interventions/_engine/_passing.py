"""Reading and editing several values in one forward pass, in the order in which the model computes them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from nnterp.interventions._engine._edits import Edit, Key, apply_edits, label_of, layer_of
from nnterp.record import Record, replace
from nnterp.values import Sum, bare, get_label, get_value, read_value, reads, when, write_value

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer


class Step(Record):
    """One thing to do in a forward pass: hold a term of a value that is a sum, or read or edit a value.

    Attributes:
        key: The value's name and layer.
        term: Index of the term to hold until the last term is computed; None to read or edit the whole value.
    """

    def __init__(self, key: Key, term: int | None = None) -> None:
        self.key, self.term = key, term


def forward_steps(model: StandardizedTransformer, keys: Iterable[Key]) -> list[Step]:
    """Steps for these values in the order in which the model computes them, each once, with the terms of sums."""
    once = list(dict.fromkeys(keys))
    layers = [None if at is None else layer_of(at) for _, at in once]
    by_rank = [Step(key) for key in sorted(once, key=lambda key: _rank(model, key))]
    if len(set(layers)) == len(layers):  # no two values of one layer
        return by_rank
    # Which of two values of a layer comes first depends on the model: parallel blocks run their parts in any order, and
    # other values may be computed between the terms of a sum.
    steps: list[tuple[float, bool, tuple[int, float], Step]] = []
    try:
        for key in once:
            ticks = [when(model, place) for place in reads(model, model.place(key[0], key[1]))[0]]
            rank = _rank(model, key)
            steps += [(tick, True, rank, Step(key, term)) for term, tick in enumerate(ticks[:-1])]
            steps.append((max(ticks), False, rank, Step(key)))
    except (KeyError, TypeError):  # the probe never reached a value
        return by_rank
    # A term is held after edits of the same tensor, so that the sum contains the edit.
    return [step for *_, step in sorted(steps, key=lambda entry: entry[:3])]


def forward_order(model: StandardizedTransformer, keys: Iterable[Key]) -> list[Key]:
    """These values in the order in which the model computes them, each once."""
    return [step.key for step in forward_steps(model, keys) if step.term is None]


class Passing:
    """Reads and edits values of a running forward pass, in the order of `forward_steps`. Make one inside the trace."""

    def __init__(self, model: StandardizedTransformer) -> None:
        self.model = model
        self.held: dict[Key, list[torch.Tensor]] = {}

    def streams_first(self, name: str) -> bool:
        """Whether the value is `[streams, batch, seq, hidden]`: the model keeps several streams side by side."""
        return name in ("layers_input", "layers_output") and self.model.readout.layout.batch == 1

    def hold(self, step: Step) -> None:
        """Read one term of a value and keep it until the value is read."""
        name, layer = step.key
        assert step.term is not None
        terms, _ = reads(self.model, self.model.place(name, layer))
        self.held.setdefault(step.key, []).append(terms[step.term].read(self.model, label_of(name, layer)))

    def read(self, key: Key) -> torch.Tensor:
        """A value whose other terms are held; several streams are `[batch, seq, streams, hidden]`."""
        name, layer = key
        if self.streams_first(name):
            return read_value(self.model, get_label(name), layer).movedim(0, 2)
        if key not in self.held:
            return read_value(self.model, get_label(name), layer)
        terms, combine = reads(self.model, self.model.place(name, layer))
        return combine([*self.held[key], terms[-1].read(self.model, label_of(name, layer))])

    def write(self, key: Key, edits: list[tuple[int, Edit]], size: tuple[int, int], offset: int) -> torch.Tensor:
        """Make edits (pairs of row and edit) of one value, and return the edited value; arguments as `apply_edits`."""
        name, layer = key
        place = self.model.place(name, layer)
        current = self.read(key)
        new = apply_edits(current, edits, size, offset)
        if not isinstance(inner := bare(place), Sum):
            kept = new.movedim(2, 0) if self.streams_first(name) else new
            write_value(self.model, get_label(name), kept, layer)
            return new
        # The terms but the last are computed and used already, so the last term takes the whole change.
        path, factor = inner.terms[-1]
        last_term, label = inner.kind(path, "output"), label_of(name, layer)
        site = last_term if inner is place else replace(place, place=last_term)  # type: ignore[type-var]
        last = site.read(self.model, label)
        change = (new - current).to(last)
        change = change / factor.to(last) if isinstance(factor, torch.Tensor) else change / factor
        site.write(self.model, last + change.view(last.shape), label)
        return new


def _rank(model: StandardizedTransformer, key: Key) -> tuple[int, float]:
    value = get_value(key[0])
    if value.stack == "encoder":  # before all layers of the decoder
        return layer_of(key[1] or 0) - 1_000_000, value.rank
    if key[1] is None:
        return (-1 if value.rank == 0 else model.num_layers, value.rank)
    return layer_of(key[1]), value.rank
