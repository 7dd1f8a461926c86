"""Values of layers that run several times in a forward pass: which run is read, and what `[layer, pass]` names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from nnsight.intervention.interleaver import Mediator

from nnterp.record import Record
from nnterp.traced._steps import step_of

if TYPE_CHECKING:
    from nnterp.traced._running import Place, Running


class InRun(Record):
    """A place in the `turn`-th of the `turns` runs of its modules in a forward pass, from 0."""

    def __init__(self, place: Place, turn: int, turns: int) -> None:
        self.place, self.turn, self.turns = place, turn, turns

    def read(self, model: Running, label: str) -> torch.Tensor:
        """The value in that run."""
        with Waiting(model, self.turn, self.turns):
            return self.place.read(model, label)

    def write(self, model: Running, tensor: torch.Tensor, label: str) -> None:
        """Replace the value in that run."""
        with Waiting(model, self.turn, self.turns):
            self.place.write(model, tensor, label)

    def __str__(self) -> str:
        return f"{self.place} (run {self.turn} of {self.turns}, from 0)"


# nnsight tells the runs of a module apart by counting. A function that it looks into is handed over when it is first
# called, whichever run is wanted.
class Waiting:
    """While the block is open, what the running worker asks for is that of one run of the modules."""

    def __init__(self, model: Running, turn: int, turns: int) -> None:
        self.model, self.turn, self.turns = model, turn, turns

    def __enter__(self) -> None:
        self.worker: Any = Mediator.current("a value")
        run = step_of(self.model, self.worker) * self.turns + self.turn
        self.outer = self.worker.__dict__.get("wanted")
        self.worker.wanted = lambda at: self.worker.occurrence(at) if at.endswith(".fn") else run

    def __exit__(self, *_: Any) -> None:
        if self.outer is None:
            del self.worker.wanted
        else:
            self.worker.wanted = self.outer


class Runs(Record):
    """For each layer module of a looped model, the indices of its runs among all runs of layers, in order."""

    def __init__(self, of: tuple[tuple[int, ...], ...]) -> None:
        self.of = of

    def index(self, layer: Any, name: str) -> int:
        """The index of `[layer, pass]`; negative numbers count from the last layer, and from the last pass.

        Raises:
            TypeError: One of the two is no integer.
            IndexError: There is no such layer, or it does not run as often.
        """
        number, turn = layer
        label = f"{name}[{number!r:.40}, {turn!r:.40}]"
        for what, given in (("layer", number), ("pass", turn)):
            if isinstance(given, bool) or not hasattr(given, "__index__"):
                raise TypeError(f"{label}: a {what} is an integer.")
        number, turn, size = number.__index__(), turn.__index__(), len(self.of)
        if not -size <= number < size:
            raise IndexError(f"{label}: the model has {size} layer modules, so layers go from {-size} to {size - 1}.")
        times = len(self.of[number])
        if not -times <= turn < times:
            raise IndexError(f"{label}: layer {number} runs {times} times, so passes go from {-times} to {times - 1}.")
        return self.of[number][turn]

    def waiting(self, model: Running, index: int) -> Waiting:
        """For one run of a layer, by its index among all runs."""
        own = next(own for own in self.of if index in own)
        return Waiting(model, own.index(index), len(own))
