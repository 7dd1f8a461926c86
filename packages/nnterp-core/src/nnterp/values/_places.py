"""Where a value is served in one model: a module's edge, an operation inside a forward, a view or a sum of these.

A place reads and writes in the running forward pass. Reading gives a live tensor wherever the value is a tensor of the
model itself (or a view of one), so that editing it in place edits the run; `Sum` makes a new tensor, which has to be
assigned to have an effect.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch

from nnterp.errors import ShapeError

if TYPE_CHECKING:
    from nnterp.standardized_transformer import StandardizedTransformer

Side = Literal["input", "output"]


class Place(Protocol):
    """What every place can do; `label` is what errors call the value."""

    def read(self, model: StandardizedTransformer, label: str) -> torch.Tensor:
        """The value in the running forward pass."""
        ...

    def write(self, model: StandardizedTransformer, tensor: torch.Tensor, label: str) -> None:
        """Replace the value by a tensor of its shape, dtype and device."""
        ...

    def __str__(self) -> str: ...


@dataclass(frozen=True)
class Site:
    """A module's edge, where it hands a tensor in or out."""

    path: str
    side: Side

    def read(self, model: StandardizedTransformer, label: str) -> torch.Tensor:
        """The tensor, or the first of several."""
        envoy = model.envoy(self.path)
        if self.side == "output":
            return first_tensor(envoy.output, label)
        args, kwargs = envoy.inputs
        return args_tensor(args, kwargs, label)[1]

    def write(self, model: StandardizedTransformer, tensor: torch.Tensor, label: str) -> None:
        """Replace the tensor; whatever is handed along with it stays."""
        envoy = model.envoy(self.path)
        if self.side == "output":
            output = envoy.output
            envoy.output = tensor if isinstance(output, torch.Tensor) else type_of(output)((tensor, *output[1:]))
            return
        args, kwargs = envoy.inputs
        _, current = args_tensor(args, kwargs, label)
        # Some attentions are handed the stream as query, key and value at once: all of them are it.
        envoy.inputs = (
            tuple(tensor if arg is current else arg for arg in args),
            {name: tensor if arg is current else arg for name, arg in kwargs.items()},
        )

    def __str__(self) -> str:
        return f"{self.path}.{self.side}"


@dataclass(frozen=True)
class Item:
    """One entry of the tuple that a module returns."""

    path: str
    index: int

    def read(self, model: StandardizedTransformer, label: str) -> torch.Tensor:
        """The entry."""
        return model.envoy(self.path).output[self.index]

    def write(self, model: StandardizedTransformer, tensor: torch.Tensor, label: str) -> None:
        """Replace the entry."""
        envoy = model.envoy(self.path)
        output = list(envoy.output)
        output[self.index] = tensor
        envoy.output = tuple(output)

    def __str__(self) -> str:
        return f"{self.path}.output[{self.index}]"


@dataclass(frozen=True)
class Inside:
    """An operation inside a module's forward, by nnsight's labels.

    Attributes:
        path: The module.
        labels: From its forward down to the operation: the function called, an operation in it, ...
        side: Whether the value is what the operation returns or what it is called with.
        key: Which entry of the tuple it returns, or which argument (a position or a keyword); None for the whole
        output.
    """

    path: str
    labels: tuple[str, ...]
    side: Side = "output"
    key: int | str | None = None

    def operation(self, model: StandardizedTransformer) -> Any:
        """nnsight's handle of the operation."""
        source = model.envoy(self.path).source
        for label in self.labels[:-1]:
            source = getattr(source, label).source
        return getattr(source, self.labels[-1])

    def read(self, model: StandardizedTransformer, label: str) -> torch.Tensor:
        """What the operation returns, or is called with."""
        operation = self.operation(model)
        if self.side == "output":
            return operation.output if self.key is None else operation.output[self.key]
        args, kwargs = operation.inputs
        return kwargs[self.key] if isinstance(self.key, str) else args[self.key]

    def write(self, model: StandardizedTransformer, tensor: torch.Tensor, label: str) -> None:
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
        operation.inputs = replaced(args, kwargs, self.key, tensor)  # type: ignore[arg-type]

    def __str__(self) -> str:
        end = {"output": ".output", "input": ".inputs"}[self.side]
        which = "" if self.key is None else (f"[{self.key}]" if self.side == "output" else f", argument {self.key}")
        return f"{self.path}.source.{'.source.'.join(self.labels)}{end}{which}"


@dataclass(frozen=True)
class Everywhere:
    """The same value computed several times over: read at the first place, written at all of them."""

    places: tuple[Place, ...]

    def read(self, model: StandardizedTransformer, label: str) -> torch.Tensor:
        """From the first place."""
        return self.places[0].read(model, label)

    def write(self, model: StandardizedTransformer, tensor: torch.Tensor, label: str) -> None:
        """At every place, in forward order."""
        for place in self.places:
            place.write(model, tensor, label)

    def __str__(self) -> str:
        return " and ".join(str(place) for place in self.places)


@dataclass(frozen=True)
class View:
    """Another shape of a place's tensor.

    Attributes:
        place: Where the tensor is.
        name: The layout the model keeps it in, for `explain`.
        show: From the model's layout to the value's; a view of the same memory wherever torch can make one.
        back: From the value's layout to the model's, given the tensor that is replaced.
    """

    place: Place
    name: str
    show: Callable[[torch.Tensor], torch.Tensor]
    back: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

    def read(self, model: StandardizedTransformer, label: str) -> torch.Tensor:
        """The value in its own layout."""
        shown = self.show(self.place.read(model, label))
        group = self.group(model)
        return shown if group is None else shown.narrow(0, *group)

    def write(self, model: StandardizedTransformer, tensor: torch.Tensor, label: str) -> None:
        """Replace it, given in its own layout."""
        current = self.place.read(model, label)
        group = self.group(model)
        if group is not None:
            whole = self.show(current).clone()
            whole[group[0] : group[0] + group[1]] = tensor
            tensor = whole
        self.place.write(model, self.back(tensor, current), label)

    def group(self, model: StandardizedTransformer) -> tuple[int, int] | None:
        """This invoke's rows, where the model's layout hides them from nnsight, which then serves all rows."""
        if not self.name.startswith("[batch ×"):
            return None
        from nnsight.intervention.interleaver import Mediator

        batcher, mine = model.interleaver.batcher, Mediator.current("a value").batch_group
        return None if mine is None or batcher is None or not batcher.batching else (mine[0], mine[1])

    def __str__(self) -> str:
        return f"{self.place} (kept as {self.name})"


@dataclass(frozen=True, eq=False)
class Sum:
    """Multiples of module outputs, added up; writing changes the last of them so that the sum becomes what is written.

    Attributes:
        terms: (module path, factor: a number or one per channel) in forward order.
        constant: Added to the sum: one number per channel, or None.
    """

    terms: tuple[tuple[str, float | torch.Tensor], ...]
    constant: torch.Tensor | None = None

    def read(self, model: StandardizedTransformer, label: str) -> torch.Tensor:
        """The sum; the module's own tensor where it is one module's output as it is."""
        return self.total([Site(path, "output").read(model, label) for path, _ in self.terms])

    def total(self, given: Sequence[torch.Tensor]) -> torch.Tensor:
        """The sum of what the terms' modules returned."""
        sum_ = added([scaled(tensor, factor) for tensor, (_, factor) in zip(given, self.terms, strict=True)])
        return sum_ if self.constant is None else sum_ + self.constant.to(sum_)

    def write(self, model: StandardizedTransformer, tensor: torch.Tensor, label: str) -> None:
        """Make the last term what the others leave; they are passed by then, so they are read on the way."""
        *others, (path, factor) = self.terms
        rest = [scaled(Site(p, "output").read(model, label), f) for p, f in others]
        last = Site(path, "output")
        current = last.read(model, label)
        if tensor.numel() != current.numel():
            raise ShapeError(
                f"{label} has shape {list(current.shape)}; a tensor of shape {list(tensor.shape)} cannot replace it."
            )
        left = tensor.reshape(current.shape).to(current.device)
        if rest:
            left = left - added(rest).to(left)
        if self.constant is not None:
            left = left - self.constant.to(left)
        if isinstance(factor, torch.Tensor):
            left = left / factor.to(left)
        elif factor != 1.0:
            left = left / factor
        last.write(model, left.to(dtype=current.dtype), label)

    def __str__(self) -> str:
        words = " + ".join(f"{_factor(factor)}{path}.output" for path, factor in self.terms)
        return words if self.constant is None else f"{words} + one constant per channel"


def _factor(factor: float | torch.Tensor) -> str:
    if isinstance(factor, torch.Tensor):
        return "one factor per channel × "
    return "" if factor == 1.0 else f"{factor:g} × "


def unflattened(model: StandardizedTransformer, tensor: torch.Tensor) -> torch.Tensor:
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


def reflattened(model: StandardizedTransformer, tensor: torch.Tensor, was: torch.Tensor) -> torch.Tensor:
    """`[batch, seq, ...]` of this invoke put back among all rows, batch and positions in one axis as in `was`."""
    from nnsight.intervention.interleaver import Mediator

    batcher = model.interleaver.batcher
    group = Mediator.current("a value").batch_group
    if batcher is None or group is None or not batcher.batching:
        return tensor.reshape(was.shape)
    whole = was.unflatten(0, (batcher.total, -1)).clone()
    whole[group[0] : group[0] + group[1]] = tensor
    return whole.reshape(was.shape)


def added(terms: list[torch.Tensor]) -> torch.Tensor:
    """The sum; one tensor as it is."""
    total = terms[0]
    for term in terms[1:]:
        total = total + term.to(total.device)
    return total


def scaled(tensor: torch.Tensor, factor: float | torch.Tensor) -> torch.Tensor:
    """A multiple of a tensor in its own dtype; the tensor itself for a factor of 1."""
    if isinstance(factor, torch.Tensor):
        return tensor * factor.to(tensor)
    return tensor if factor == 1.0 else tensor * factor


def replaced(args: tuple, kwargs: dict[str, Any], key: int | str, tensor: torch.Tensor) -> tuple[tuple, dict[str, Any]]:
    """Arguments with one of them replaced."""
    if isinstance(key, int):
        return (*args[:key], tensor, *args[key + 1 :]), kwargs
    return args, {**kwargs, key: tensor}


def type_of(output: Any) -> type:
    """The container to rebuild a module's output in: list or tuple."""
    return list if isinstance(output, list) else tuple


def first_tensor(output: Any, label: str) -> torch.Tensor:
    """The stream in what a module returned: the tensor itself, or the first entry of a tuple."""
    if isinstance(output, torch.Tensor):
        return output
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], torch.Tensor):
        return output[0]
    raise TypeError(f"{label}: the module returned a {type(output).__name__} that does not begin with a tensor.")


def args_tensor(args: tuple, kwargs: dict[str, Any], label: str) -> tuple[int | str, torch.Tensor]:
    """The stream among what a module was called with: the first floating tensor, by position, then by keyword."""
    for i, arg in enumerate(args):
        if isinstance(arg, torch.Tensor) and arg.is_floating_point():
            return i, arg
    for key in ("hidden_states", *kwargs):
        arg = kwargs.get(key)
        if isinstance(arg, torch.Tensor) and arg.is_floating_point():
            return key, arg
    raise TypeError(f"{label}: the module was called without a floating point tensor.")
