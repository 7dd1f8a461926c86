"""Where a value is served in one model: a module's input or output, or an operation inside a module's forward.

A place reads and writes in the running forward pass. It reads the model's own tensor: an edit in place edits the run.
`EditedLater` is for tensors that the model's own code edits, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from nnsight.intervention.source import STATE

from nnterp.errors import Unavailable
from nnterp.record import Record
from nnterp.tensors import stream_in, stream_out
from nnterp.traced._bracketing import BRACKETED

if TYPE_CHECKING:
    from nnterp.table import Side
    from nnterp.traced._running import Place, Running


class Site(Record):
    """A module's input or output."""

    def __init__(self, path: str, side: Side) -> None:
        self.path, self.side = path, side

    def read(self, model: Running, label: str) -> torch.Tensor:
        """The stream in what the module is given or returns."""
        envoy = model.envoy(self.path)
        if self.side == "output":
            return stream_returned(envoy.output, label)
        args, kwargs = envoy.inputs
        return stream_given(args, kwargs, label)

    def write(self, model: Running, tensor: torch.Tensor, label: str) -> None:
        """Replace the stream; the other arguments, or the other things returned, stay."""
        envoy = model.envoy(self.path)
        if self.side == "output":
            output = envoy.output
            envoy.output = tensor if isinstance(output, torch.Tensor) else container_of(output)((tensor, *output[1:]))
            return
        args, kwargs = envoy.inputs
        current = stream_given(args, kwargs, label)
        # Some attentions are given the stream as query, key and value: all three are replaced.
        envoy.inputs = (
            tuple(tensor if arg is current else arg for arg in args),
            {name: tensor if arg is current else arg for name, arg in kwargs.items()},
        )

    def __str__(self) -> str:
        return f"{self.path}.{self.side}"


class Item(Record):
    """One entry of the tuple that a module returns."""

    def __init__(self, path: str, index: int) -> None:
        self.path, self.index = path, index

    def read(self, model: Running, label: str) -> torch.Tensor:
        """The entry."""
        return model.envoy(self.path).output[self.index]

    def write(self, model: Running, tensor: torch.Tensor, label: str) -> None:
        """Replace the entry."""
        envoy = model.envoy(self.path)
        output = list(envoy.output)
        output[self.index] = tensor
        envoy.output = tuple(output)

    def __str__(self) -> str:
        return f"{self.path}.output[{self.index}]"


class Inside(Record):
    """An operation inside a module's forward.

    Attributes:
        path: The module.
        labels: nnsight's labels from the module's forward down to the operation: a function it calls, an operation in
            that function, ...
        side: Whether the value is what the operation returns or what it is called with.
        key: Which entry of the tuple it returns, or which argument (a position or a keyword); None for all of what it
            returns.
    """

    def __init__(self, path: str, labels: tuple[str, ...], side: Side = "output", key: int | str | None = None) -> None:
        self.path, self.labels, self.side, self.key = path, labels, side, key

    def operation(self, model: Running) -> Any:
        """nnsight's handle of the operation."""
        envoy = model.envoy(self.path)
        state = envoy._module.__dict__[STATE]
        source = looked_into(model, envoy, state.sourced, "skip", getattr(state.body, BRACKETED, None))
        for label in self.labels[:-1]:
            operation = getattr(source, label)
            known = model.interleaver.sourced.get(operation.path) is not None
            if not known:
                count_alike(model, [f"{operation.path}.fn"], f"{operation.path}.skip")
            source = looked_into(model, operation, known, "fn")
        return getattr(source, self.labels[-1])

    def read(self, model: Running, label: str) -> torch.Tensor:
        """What the operation returns, or is called with."""
        operation = self.operation(model)
        if self.side == "output":
            return operation.output if self.key is None else operation.output[self.key]
        args, kwargs = operation.inputs
        return kwargs[self.key] if isinstance(self.key, str) else args[self.key]

    def write(self, model: Running, tensor: torch.Tensor, label: str) -> None:
        """Replace it."""
        operation = self.operation(model)
        if self.side == "output":
            if isinstance(self.key, int):
                output = list(operation.output)
                output[self.key] = tensor
                operation.output = tuple(output)
            else:
                operation.output = tensor
            return
        args, kwargs = operation.inputs
        operation.inputs = with_argument(args, kwargs, self.key, tensor)  # type: ignore[arg-type]

    def __str__(self) -> str:
        end = {"output": ".output", "input": ".inputs"}[self.side]
        which = "" if self.key is None else (f"[{self.key}]" if self.side == "output" else f", argument {self.key}")
        return f"{self.path}.source.{'.source.'.join(self.labels)}{end}{which}"


class Everywhere(Record):
    """The same value computed several times over: read at the first place, written at all of them."""

    def __init__(self, places: tuple[Place, ...]) -> None:
        self.places = places

    def read(self, model: Running, label: str) -> torch.Tensor:
        """From the first place."""
        return self.places[0].read(model, label)

    def write(self, model: Running, tensor: torch.Tensor, label: str) -> None:
        """At every place, in forward order."""
        for place in self.places:
            place.write(model, tensor, label)

    def __str__(self) -> str:
        return " and ".join(str(place) for place in self.places)


class Declared(Record):
    """Attention probabilities where the user's `RenameConfig(attn_prob_source=...)` says they are."""

    def __init__(self, layer: int, source: Callable) -> None:
        self.layer, self.source = layer, source

    def attention(self, model: Running) -> Any:
        """The envoy of the layer's attention module."""
        return model.envoy(model.module_path("self_attn", self.layer))

    def read(self, model: Running, label: str) -> torch.Tensor:
        """The probabilities."""
        return self.source(self.attention(model)).output

    def write(self, model: Running, tensor: torch.Tensor, label: str) -> None:
        """Replace them."""
        self.source(self.attention(model)).output = tensor

    def __str__(self) -> str:
        return f"RenameConfig(attn_prob_source={self.source!r})"


class ReadOnly(Record):
    """A place that can be read and not written."""

    def __init__(self, place: Place, reason: str) -> None:
        self.place, self.reason = place, reason

    def read(self, model: Running, label: str) -> torch.Tensor:
        """The value."""
        return self.place.read(model, label)

    def write(self, model: Running, tensor: torch.Tensor, label: str) -> None:
        """Refused."""
        raise Unavailable(f"{label} can be read but not written in {model.model_class}: {self.reason}.")

    def __str__(self) -> str:
        return f"{self.place} (read only)"


# nnsight counts the runs of an operation from when it first looks into what runs it: after some steps of a generation,
# or passes of a looped model, it would take one run for another.
def looked_into(model: Running, whole: Any, known: bool, like: str, watched: str | None = None) -> Any:
    """The operations in a module or an operation: their runs count as its own, those of `watched` were counted."""
    source = whole.source
    if not known:
        names, ends = (name for name in source.compiled.names if name != watched), ("input", "skip", "output")
        ats = [f"{whole.path}.source.{name}.{end}" for name in names for end in ends]
        count_alike(model, ats, f"{whole.path}.{like}")
    return source


# Lets locations at which the run has not been watched have been reached as often as another one.
def count_alike(model: Running, ats: list[str], like: str) -> None:
    workers = [(w.counts_at_start, getattr(w, "begin", {})) for w in model.interleaver.mediators]
    for counts in (model.interleaver.counts, *(counts for pair in workers for counts in pair)):
        counts.update(dict.fromkeys(ats, counts.get(like, 0)))


def bare(place: Any) -> Any:
    """What a place in one run of a looped layer wraps; any other place as it is."""
    return place.place if hasattr(place, "turns") else place


def with_argument(
    args: tuple, kwargs: dict[str, Any], key: int | str, tensor: torch.Tensor
) -> tuple[tuple, dict[str, Any]]:
    """Arguments with one of them replaced."""
    if isinstance(key, int):
        return (*args[:key], tensor, *args[key + 1 :]), kwargs
    return args, {**kwargs, key: tensor}


def container_of(output: Any) -> type:
    """The container to rebuild a module's output in: list or tuple."""
    return list if isinstance(output, list) else tuple


def stream_returned(output: Any, label: str) -> torch.Tensor:
    """The stream in what a module returned.

    Raises:
        TypeError: It does not begin with a tensor.
    """
    stream = stream_out(output)
    if stream is None:
        raise TypeError(f"{label}: the module returned a {type(output).__name__} that does not begin with a tensor.")
    return stream


def stream_given(args: tuple, kwargs: dict[str, Any], label: str) -> torch.Tensor:
    """The stream among what a module was called with.

    Raises:
        TypeError: No floating point tensor is among it.
    """
    stream = stream_in(args, kwargs)
    if stream is None:
        raise TypeError(f"{label}: the module was called without a floating point tensor.")
    return stream
