"""A dictionary's features as a value of the running forward pass: reading encodes, writing adds the decoded change."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from nnsight.intervention.interleaver import Mediator, OutOfOrderError
from torch._subclasses.fake_tensor import is_fake

from nnterp.errors import ShapeError, Unavailable
from nnterp.record import Record, replace
from nnterp.traced._places import bare
from nnterp.traced._steps import step_of
from nnterp.traced._sums import Sum
from nnterp.traced._views import reflattened, unflattened

if TYPE_CHECKING:
    from nnterp.traced._dictionary import Dictionary
    from nnterp.traced._running import Place, Running


class Features(Record):
    """What a dictionary makes of a value, `[batch, seq, features]`.

    Reading encodes the value. Writing leaves what the dictionary does not reconstruct as it is: the decoded change of
    the features is added to the value that the dictionary writes.

    Attributes:
        dictionary: The dictionary.
        index: Its layer, and its number among the dictionaries of this layer.
        reads, writes: The values that it encodes and decodes to, as in "layers_output[12]".
        read_place, write_place: Where they are served; the same place for an autoencoder.
        axes, write_axes: How many axes they have: 4 for those with an axis of heads, which are flattened.
    """

    def __init__(
        self,
        dictionary: Dictionary,
        index: tuple[int, int],
        reads: str,
        writes: str,
        read_place: Place,
        write_place: Place,
        axes: int,
        write_axes: int,
    ) -> None:
        self.dictionary, self.index, self.reads, self.writes = dictionary, index, reads, writes
        self.read_place, self.write_place, self.axes, self.write_axes = read_place, write_place, axes, write_axes

    def __eq__(self, other: object) -> bool:  # a dictionary holds tensors
        return self is other

    def __hash__(self) -> int:
        return id(self)

    def read(self, model: Running, label: str) -> torch.Tensor:
        """The features, in the dictionary's dtype and on its device; a new tensor."""
        return self.current(model, label)[1].clone()

    def write(self, model: Running, tensor: torch.Tensor, label: str) -> None:
        """Add the decoded change to the value that the dictionary writes, when the model reaches it."""
        x, before = self.current(model, label)
        change = self.decoded(tensor.to(before) - before, x)
        if self.reads == self.writes:
            x = self.added(model, change, label)
        else:
            _later(model, self, change, label)
        self.note(model, x, tensor.to(before).clone())

    def current(self, model: Running, label: str) -> tuple[torch.Tensor, torch.Tensor]:
        """What is encoded, `[batch, seq, width]`, and its features: those last written, if it has not changed since."""
        x = self.flat(shown(model, self.read_place, self.axes, label), self.axes)
        seen, features = noted_of(model, self.read_place).get(self.index, (None, None))
        if seen is not None and seen.shape == x.shape and not is_fake(x) and torch.equal(seen, x):
            return x, features
        features = self.encode(x)
        self.note(model, x, features)
        return x, features

    def note(self, model: Running, x: torch.Tensor, features: torch.Tensor) -> None:
        """Keep the features of what is encoded until the block goes on to another value."""
        noted_of(model, self.read_place)[self.index] = x.detach().clone(), features

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """The features of the value.

        Raises:
            ShapeError: It has another width than the dictionary.
        """
        if x.shape[-1] != self.dictionary.width:
            raise ShapeError(
                f"The dictionary attached to {self.reads} encodes activations of width {self.dictionary.width}; "
                f"{self.reads} has shape {list(x.shape)}."
            )
        return self.dictionary.encode(x)

    def decoded(self, change: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """What a change of features changes in the value that is written, `[..., output width]`."""
        return self.dictionary.decode_change(change, x)

    def slopes(self, gradient: torch.Tensor) -> torch.Tensor:
        """Gradients with respect to features, of those with respect to what they are decoded into.

        Raises:
            Unavailable: What is decoded is scaled by what was encoded, which the gradient alone does not tell.
        """
        if self.dictionary.scaling is not None and self.dictionary.scaling.restores:
            raise Unavailable(
                f"Gradients with respect to the features of {self.reads} cannot be had: this dictionary scales what it "
                "decodes by the norm of what it encoded."
            )
        return gradient.to(self.dictionary.decoder) @ self.dictionary.decoder.T

    def added(self, model: Running, change: torch.Tensor, label: str) -> torch.Tensor:
        """Add a change to the value that is written, and return the value as it is then, heads flattened.

        Raises:
            ShapeError: The dictionary decodes to another width than the value's.
        """
        if isinstance(bare(self.write_place), Sum):
            return self.added_to_last(model, self.write_place, change, label)
        target = shown(model, self.write_place, self.write_axes, label)
        moved = self.moved(target, change)
        current = self.write_place.read(model, label)
        stored = moved if moved.dim() == current.dim() else reflattened(model, moved, current)
        self.write_place.write(model, stored, label)
        return self.flat(moved, self.write_axes)

    def added_to_last(self, model: Running, place: Place, change: torch.Tensor, label: str) -> torch.Tensor:
        """As `added`, to the last term of a sum: the others are passed by then, and need not be read."""
        terms = bare(place).terms
        path, factor = terms[-1]
        change = change / (factor.to(change) if isinstance(factor, torch.Tensor) else factor)
        last: Place = bare(place).kind(path, "output")
        last = last if bare(place) is place else replace(place, place=last)  # type: ignore[type-var]
        last.write(model, self.moved(last.read(model, label), change), label)
        if len(terms) > 1:
            return change  # the sum cannot be read again
        return self.flat(shown(model, place, self.write_axes, label), self.write_axes)

    def moved(self, target: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
        """A value with a change added, in its own dtype and on its device.

        Raises:
            ShapeError: The dictionary decodes to another width.
        """
        if target.numel() != change.numel():
            raise ShapeError(
                f"The dictionary attached to {self.reads} decodes to activations of width {change.shape[-1]}; "
                f"{self.writes} has shape {list(target.shape)}."
            )
        return (target + change.reshape(target.shape).to(target.device)).to(target.dtype)

    def flat(self, x: torch.Tensor, axes: int) -> torch.Tensor:
        """A value with its axis of heads flattened."""
        return x.flatten(-2) if axes == 4 else x

    def __str__(self) -> str:
        there = "" if self.reads == self.writes else f", written at {self.writes} ({self.write_place})"
        return f"{self.reads} ({self.read_place}), encoded{there}"


class Attached(Record):
    """The dictionaries of a model: (layer, number) → features."""

    def __init__(self, features: dict[tuple[int, int], Features]) -> None:
        self.features = features

    def place(self, index: Any) -> Features:
        """The features at a layer, at (layer, number), or at a value's name.

        Raises:
            ValueError: Several dictionaries are meant; lists them.
            Unavailable: None is meant.
        """
        if isinstance(index, tuple):
            found = [self.features[index]] if index in self.features else []
        elif isinstance(index, str):
            found = [one for one in self.features.values() if index in (one.reads, one.writes)]
        else:
            found = [one for key, one in self.features.items() if key[0] == index]
        if len(found) == 1:
            return found[0]
        shown_index = ", ".join(map(str, index)) if isinstance(index, tuple) else repr(index)
        if found:
            raise ValueError(
                f"features[{shown_index}] may mean several dictionaries: {listed(found)}. Name one of them by its two "
                f"numbers."
            )
        raise Unavailable(
            f"No dictionary is attached at features[{shown_index}]; attached are: {listed(self.features.values())}. "
            "Attach one with nnterp.attach(model, dictionary, at='layers_output[12]')."
        )


def listed(features: Any) -> str:
    """Dictionaries in words: "features[12, 0] (layers_output[12], 16384 features)"."""
    return ", ".join(
        f"features[{one.index[0]}, {one.index[1]}] ({one.reads}"
        f"{'' if one.reads == one.writes else ' to ' + one.writes}, {one.dictionary.num_features} features)"
        for one in features
    )


class Later(Mediator):
    """The worker that adds a change to a value that the running pass has not reached yet."""

    def __init__(self, model: Running, features: Features, change: torch.Tensor, label: str, step: int, begin: dict):
        Mediator.__init__(self, None, {}, {})
        self.model, self.features, self.change, self.label = model, features, change, label
        self.step, self.begin = step, begin

    def _run(self) -> None:
        try:
            self.features.added(self.model, self.change, self.label)
        except OutOfOrderError as error:
            error.args = (
                f"{self.label} was written, but the forward pass never reached {self.features.writes} after that, "
                f"where the change is made. [{error.args[0]}]",
            )
            raise
        self.flush()

    def occurrence(self, location: str) -> int:
        """How many times the model has reached `location` since the run began."""
        return self.interleaver.counts.get(location, 0) - self.begin.get(location, 0)

    def wanted(self, location: str) -> int:
        """The pass in which the features were written."""
        return self.step


def _later(model: Running, features: Features, change: torch.Tensor, label: str) -> None:
    """Start a worker that adds the change when the model comes to it, before the block that runs is served there."""
    mine: Any = Mediator.current(label)
    begin = getattr(mine, "begin", mine.counts_at_start)
    worker = Later(model, features, change, label, step_of(model, mine), begin)
    worker.batch_group = mine.batch_group
    mediators = model.interleaver.mediators
    mediators.insert(mediators.index(mine), worker)
    worker.start(model.interleaver)


def shown(model: Running, place: Place, axes: int, label: str) -> torch.Tensor:
    """A value in the shape that the table says, `[batch, seq, ...]`."""
    tensor = place.read(model, label)
    return tensor if tensor.dim() >= axes else unflattened(model, tensor)


def noted_of(model: Running, reads: Place) -> dict[tuple[int, int], Any]:
    """What the running block has encoded at a place in this pass; what it noted at any other place is dropped."""
    mine: Any = Mediator.current("features")
    now = step_of(model, mine), str(reads)
    kept = mine.__dict__.get("_nnterp_features")
    if kept is None or kept[0] != now:
        kept = mine.__dict__["_nnterp_features"] = (now, {})
    return kept[1]
