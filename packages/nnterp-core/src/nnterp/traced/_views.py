"""Values in another shape than the model's: batch first, then positions, then heads, for this invoke's rows alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from nnterp.record import Record
from nnterp.traced._layouts import Layout

if TYPE_CHECKING:
    from nnterp.traced._running import Place, Running


class View(Record):
    """A place whose tensor the model stores in another layout than the value is shown in.

    Attributes:
        place: Where the tensor is.
        layout: How the model stores it there.
    """

    def __init__(self, place: Place, layout: Layout) -> None:
        self.place, self.layout = place, layout

    def read(self, model: Running, label: str) -> torch.Tensor:
        """The value in its own layout."""
        shown = self.layout.show(self.every_row(model, lambda: self.place.read(model, label)))
        group = self.group(model)
        return shown if group is None else shown.narrow(0, *group)

    def write(self, model: Running, tensor: torch.Tensor, label: str) -> None:
        """Replace it, given in its own layout."""
        current = self.every_row(model, lambda: self.place.read(model, label))
        group = self.group(model)
        if group is not None:
            whole = self.layout.show(current).clone()
            whole[group[0] : group[0] + group[1]] = tensor
            tensor = whole
        self.every_row(model, lambda: self.place.write(model, self.layout.back(tensor, current), label))

    def every_row(self, model: Running, act: Callable[[], Any]) -> Any:
        """Act on the rows of all invokes. nnsight slices the first axis per invoke, and here it is not the batch."""
        return in_every_row(act) if self.layout.name.startswith("[seq, batch") else act()

    def group(self, model: Running) -> tuple[int, int] | None:
        """(first row, number of rows) of this invoke; None where nnsight serves only these rows by itself."""
        if not self.layout.name.startswith(("[batch ×", "[seq, batch")):
            return None
        from nnsight.intervention.interleaver import Mediator

        batcher, mine = model.interleaver.batcher, Mediator.current("a value").batch_group
        return None if mine is None or batcher is None or not batcher.batching else (mine[0], mine[1])

    def __str__(self) -> str:
        return f"{self.place} (stored as {self.layout.name})"


def in_every_row(act: Callable[[], Any]) -> Any:
    """Act on the rows of all invokes, and not on those of this one alone."""
    from nnsight.intervention.interleaver import Mediator

    worker = Mediator.current("a value")
    mine, worker.batch_group = worker.batch_group, None
    try:
        return act()
    finally:
        worker.batch_group = mine


def over(place: Place, layout: Layout) -> Place:
    """The place with the value's layout: the place itself if the model stores it as `[batch, seq, heads, ...]`."""
    return place if layout.name.startswith("[batch, seq, heads,") else View(place, layout)


def unflattened(model: Running, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that has batch and positions in one axis, as `[batch, seq, ...]`: this invoke's rows of it, as a
    view."""
    from nnsight.intervention.interleaver import Mediator

    batcher = model.interleaver.batcher
    rows = batcher.total if batcher is not None else 0
    if not rows or tensor.shape[0] % rows:
        return tensor
    shaped = tensor.unflatten(0, (rows, -1))
    group = Mediator.current("a value").batch_group
    return shaped if group is None or not batcher.batching else shaped.narrow(0, *group)


def reflattened(model: Running, tensor: torch.Tensor, was: torch.Tensor) -> torch.Tensor:
    """`[batch, seq, ...]` of this invoke put back among all rows, batch and positions in one axis as in `was`."""
    from nnsight.intervention.interleaver import Mediator

    batcher = model.interleaver.batcher
    group = Mediator.current("a value").batch_group
    if batcher is None or group is None or not batcher.batching:
        return tensor.reshape(was.shape)
    whole = was.unflatten(0, (batcher.total, -1)).clone()
    whole[group[0] : group[0] + group[1]] = tensor
    return whole.reshape(was.shape)
