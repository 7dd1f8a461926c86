"""The operations recorded in one layer's attention, and the tensors among them that may be queries, keys or values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

import torch

from nnterp.discovery._recording import Operation, Recording
from nnterp.tensors import same
from nnterp.traced import Inside

PRODUCTS = ("matmul", "bmm", "baddbmm", "einsum", "scaled_dot_product_attention")


@dataclass(frozen=True)
class Candidate:
    """A tensor that an operation was given or returned.

    Attributes:
        place: Where it is served.
        tensor: A copy of it.
        when: When the eager run passed it, on that recording's clock.
        alike: Compares it with what the operation holds when the model computes attention in its own way.
    """

    place: Inside
    tensor: torch.Tensor
    when: int
    alike: Callable[[], bool]

    @property
    def both(self) -> bool:
        """True if the same operation holds the same numbers when the model computes attention in its own way."""
        return self.alike()


class Evidence:
    """What was recorded in the attention of one layer.

    Args:
        paths: The modules of the attention that have code of their own.
        current: A forward pass in which attention was computed as the model does it.
        eager: The same pass with eager attention, or `current` again.
        tolerance: The largest relative error that counts as equal.

    Attributes:
        operations: The operations of the eager pass, in the order in which they began.
        tolerance: As given.
    """

    def __init__(self, paths: list[str], current: Recording, eager: Recording, tolerance: float) -> None:
        self.tolerance = tolerance
        self.operations: list[Operation] = [o for path in paths for o in eager.operations_of(path)]
        self.operations.sort(key=lambda o: o.began)
        self._compared: dict[tuple[int, int], bool] = {}
        self._current = {(o.path, o.labels): o for path in paths for o in current.operations_of(path)}

    def beside(self, operation: Operation) -> list[Operation]:
        """The operations of the function that `operation` belongs to, except those that ran several times."""
        return [
            o
            for o in self.operations
            if o.path == operation.path and o.labels[:-1] == operation.labels[:-1] and o.times == 1
        ]

    def given(self, operation: Operation) -> Iterator[Candidate]:
        """The floating tensors of three or more axes that an operation was called with."""
        other = self._current.get((operation.path, operation.labels))
        theirs = dict(other.tensors_in()) if other is not None else {}
        for key, tensor in operation.tensors_in():
            if tensor.is_floating_point() and tensor.dim() >= 3:
                place = Inside(operation.path, operation.labels, "input", key)
                yield Candidate(place, tensor, operation.began, partial(self._alike, tensor, theirs.get(key)))

    def returned(self, operation: Operation) -> Iterator[Candidate]:
        """The floating tensors of three or more axes that an operation returned."""
        other = self._current.get((operation.path, operation.labels))
        theirs = dict(other.tensors_out()) if other is not None else {}
        for key, tensor in operation.tensors_out():
            if tensor.is_floating_point() and tensor.dim() >= 3:
                place = Inside(operation.path, operation.labels, "output", key)
                yield Candidate(place, tensor, operation.ended, partial(self._alike, tensor, theirs.get(key)))

    def around(self, softmax: Operation) -> Iterator[Candidate]:
        """The tensors in the function that calls the softmax and in the functions that call it, best place first.

        First the arguments of those functions, because the call is the same however attention is computed. Then the
        arguments of matrix products. Then what the operations return, the last one first.
        """
        for depth in range(1, len(softmax.labels)):
            for operation in self.operations:
                if operation.path == softmax.path and operation.labels == softmax.labels[:depth]:
                    yield from self.given(operation)
        functions = {softmax.labels[:depth] for depth in range(len(softmax.labels))}
        near = [o for o in self.operations if o.path == softmax.path and o.labels[:-1] in functions and o.times == 1]
        for operation in near:
            if operation.function is not None and operation.called in PRODUCTS:
                yield from self.given(operation)
        for operation in sorted(near, key=lambda o: -o.ended):
            yield from self.returned(operation)

    def _alike(self, mine: torch.Tensor, theirs: torch.Tensor | None) -> bool:
        """Whether the two runs hold the same numbers; each pair is compared once, though searches ask for it often."""
        if theirs is None:
            return False
        pair = id(mine), id(theirs)  # of recordings, which outlive this object
        if pair not in self._compared:
            self._compared[pair] = same(mine, theirs, max(self.tolerance * 100, 1e-3))
        return self._compared[pair]


class _Seen(Protocol):
    @property
    def both(self) -> bool: ...


SeenT = TypeVar("SeenT", bound=_Seen)


def best(options: Iterable[SeenT], fits: Callable[[SeenT], bool]) -> SeenT | None:
    """The first option that fits and is `both`; without one, the first that fits; None if none fits."""
    found: SeenT | None = None
    for option in options:
        if (found is None or option.both) and fits(option):
            if option.both:
                return option
            found = option
    return found
