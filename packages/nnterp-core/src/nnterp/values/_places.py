"""Where a value is served in one model: a module's edge, an operation inside a forward, a view or a sum of these.

A place reads and writes in the running forward pass. Reading gives a live tensor wherever the value is a tensor of the
model itself (or a view of one), so that editing it in place edits the run; `Sum` makes a new tensor, which has to be
assigned to have an effect. Places travel to a remote worker, so nothing here needs more of a model than
`TracedTransformer` has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import nn

from nnterp.errors import ShapeError, Unavailable
from nnterp.record import Record
from nnterp.values._layouts import Layout

if TYPE_CHECKING:
    from nnterp.traced_transformer import TracedTransformer

Side = Literal["input", "output"]


class Place(Protocol):
    """What every place can do; `label` is what errors call the value."""

    def read(self, model: TracedTransformer, label: str) -> torch.Tensor:
        """The value in the running forward pass."""
        ...

    def write(self, model: TracedTransformer, tensor: torch.Tensor, label: str) -> None:
        """Replace the value by a tensor of its shape, dtype and device."""
        ...

    def __str__(self) -> str: ...


class Site(Record):
    """A module's edge, where it hands a tensor in or out."""

    def __init__(self, path: str, side: Side) -> None:
        self.path, self.side = path, side

    def read(self, model: TracedTransformer, label: str) -> torch.Tensor:
        """The tensor, or the first of several."""
        envoy = model.envoy(self.path)
        if self.side == "output":
            return first_tensor(envoy.output, label)
        args, kwargs = envoy.inputs
        return args_tensor(args, kwargs, label)[1]

    def write(self, model: TracedTransformer, tensor: torch.Tensor, label: str) -> None:
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


class Item(Record):
    """One entry of the tuple that a module returns."""

    def __init__(self, path: str, index: int) -> None:
        self.path, self.index = path, index

    def read(self, model: TracedTransformer, label: str) -> torch.Tensor:
        """The entry."""
        return model.envoy(self.path).output[self.index]

    def write(self, model: TracedTransformer, tensor: torch.Tensor, label: str) -> None:
        """Replace the entry."""
        envoy = model.envoy(self.path)
        output = list(envoy.output)
        output[self.index] = tensor
        envoy.output = tuple(output)

    def __str__(self) -> str:
        return f"{self.path}.output[{self.index}]"


class Inside(Record):
    """An operation inside a module's forward, by nnsight's labels.

    Attributes:
        path: The module.
        labels: From its forward down to the operation: the function called, an operation in it, ...
        side: Whether the value is what the operation returns or what it is called with.
        key: Which entry of the tuple it returns, or which argument (a position or a keyword); None for the whole
        output.
    """

    def __init__(self, path: str, labels: tuple[str, ...], side: Side = "output", key: int | str | None = None) -> None:
        self.path, self.labels, self.side, self.key = path, labels, side, key

    def operation(self, model: TracedTransformer) -> Any:
        """nnsight's handle of the operation."""
        source = model.envoy(self.path).source
        for label in self.labels[:-1]:
            source = getattr(source, label).source
        return getattr(source, self.labels[-1])

    def read(self, model: TracedTransformer, label: str) -> torch.Tensor:
        """What the operation returns, or is called with."""
        operation = self.operation(model)
        if self.side == "output":
            return operation.output if self.key is None else operation.output[self.key]
        args, kwargs = operation.inputs
        return kwargs[self.key] if isinstance(self.key, str) else args[self.key]

    def write(self, model: TracedTransformer, tensor: torch.Tensor, label: str) -> None:
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


class Everywhere(Record):
    """The same value computed several times over: read at the first place, written at all of them."""

    def __init__(self, places: tuple[Place, ...]) -> None:
        self.places = places

    def read(self, model: TracedTransformer, label: str) -> torch.Tensor:
        """From the first place."""
        return self.places[0].read(model, label)

    def write(self, model: TracedTransformer, tensor: torch.Tensor, label: str) -> None:
        """At every place, in forward order."""
        for place in self.places:
            place.write(model, tensor, label)

    def __str__(self) -> str:
        return " and ".join(str(place) for place in self.places)


class View(Record):
    """Another shape of a place's tensor: `place` is where it is, `layout` how the model keeps it there."""

    def __init__(self, place: Place, layout: Layout) -> None:
        self.place, self.layout = place, layout

    def read(self, model: TracedTransformer, label: str) -> torch.Tensor:
        """The value in its own layout."""
        shown = self.layout.show(self.every_row(model, lambda: self.place.read(model, label)))
        group = self.group(model)
        return shown if group is None else shown.narrow(0, *group)

    def write(self, model: TracedTransformer, tensor: torch.Tensor, label: str) -> None:
        """Replace it, given in its own layout."""
        current = self.every_row(model, lambda: self.place.read(model, label))
        group = self.group(model)
        if group is not None:
            whole = self.layout.show(current).clone()
            whole[group[0] : group[0] + group[1]] = tensor
            tensor = whole
        self.every_row(model, lambda: self.place.write(model, self.layout.back(tensor, current), label))

    def every_row(self, model: TracedTransformer, act: Callable[[], Any]) -> Any:
        """Act on the rows of all invokes: nnsight takes the first axis for the batch, whatever it is."""
        if not self.layout.name.startswith("[seq, batch"):
            return act()
        from nnsight.intervention.interleaver import Mediator

        worker = Mediator.current("a value")
        mine, worker.batch_group = worker.batch_group, None
        try:
            return act()
        finally:
            worker.batch_group = mine

    def group(self, model: TracedTransformer) -> tuple[int, int] | None:
        """This invoke's rows, where the model's layout hides them from nnsight, which then serves all rows."""
        if not self.layout.name.startswith(("[batch ×", "[seq, batch")):
            return None
        from nnsight.intervention.interleaver import Mediator

        batcher, mine = model.interleaver.batcher, Mediator.current("a value").batch_group
        return None if mine is None or batcher is None or not batcher.batching else (mine[0], mine[1])

    def __str__(self) -> str:
        return f"{self.place} (kept as {self.layout.name})"


def over(place: Place, layout: Layout) -> Place:
    """A place shown in the value's layout."""
    return place if layout.name.startswith("[batch, seq, heads,") else View(place, layout)


class Sum(Record):
    """Multiples of module outputs, added up; writing changes the last of them so that the sum becomes what is written.

    Attributes:
        terms: (module path, factor: a number or one per channel) in forward order.
        constant: Added to the sum: one number per channel, or None.
    """

    def __init__(
        self, terms: tuple[tuple[str, float | torch.Tensor], ...], constant: torch.Tensor | None = None
    ) -> None:
        self.terms, self.constant = terms, constant

    def __eq__(self, other: object) -> bool:  # factors may be tensors
        return self is other

    def __hash__(self) -> int:
        return id(self)

    def read(self, model: TracedTransformer, label: str) -> torch.Tensor:
        """The sum; the module's own tensor where it is one module's output as it is."""
        return self.total([Site(path, "output").read(model, label) for path, _ in self.terms])

    def total(self, given: Sequence[torch.Tensor]) -> torch.Tensor:
        """The sum of what the terms' modules returned."""
        sum_ = added([scaled(tensor, factor) for tensor, (_, factor) in zip(given, self.terms, strict=True)])
        return sum_ if self.constant is None else sum_ + self.constant.to(sum_)

    def write(self, model: TracedTransformer, tensor: torch.Tensor, label: str) -> None:
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


class Declared(Record):
    """Attention probabilities where the user's `RenameConfig(attn_prob_source=...)` says they are."""

    def __init__(self, layer: int, source: Callable) -> None:
        self.layer, self.source = layer, source

    def read(self, model: TracedTransformer, label: str) -> torch.Tensor:
        """The probabilities."""
        return self.source(model.attentions[self.layer]).output

    def write(self, model: TracedTransformer, tensor: torch.Tensor, label: str) -> None:
        """Replace them."""
        self.source(model.attentions[self.layer]).output = tensor

    def __str__(self) -> str:
        return f"RenameConfig(attn_prob_source={self.source!r})"


class ReadOnly(Record):
    """A place that can be read and not written."""

    def __init__(self, place: Place, reason: str) -> None:
        self.place, self.reason = place, reason

    def read(self, model: TracedTransformer, label: str) -> torch.Tensor:
        """The value."""
        return self.place.read(model, label)

    def write(self, model: TracedTransformer, tensor: torch.Tensor, label: str) -> None:
        """Refused."""
        raise Unavailable(f"{label} can be read but not written in {model.model_class}: {self.reason}.")

    def __str__(self) -> str:
        return f"{self.place} (read only)"


class ThroughOut(Record):
    """Each head's part of what W_O returns.

    The projection is applied to one head at a time, the others at zero, less what it returns for zeros: right for any
    module that is linear up to a bias, quantised or adapted ones included.

    Attributes:
        heads: Where the heads are.
        path: W_O.
        before: (path, shape of one position's input) of a projection that stands between them.
    """

    def __init__(self, heads: Place, path: str, before: tuple[str, tuple[int, ...]] | None = None) -> None:
        self.heads, self.path, self.before = heads, path, before

    def read(self, model: TracedTransformer, label: str) -> torch.Tensor:
        """`[batch, seq, heads, hidden]`; a new tensor."""
        return self.through(model, self.heads.read(model, label))

    def write(self, model: TracedTransformer, tensor: torch.Tensor, label: str) -> None:
        """Make W_O return their sum and its bias."""
        bias = self.through(model, self.heads.read(model, label), bias_only=True)
        envoy = model.envoy(self.path)
        output = envoy.output
        envoy.output = (tensor.sum(2) + bias).reshape(output.shape)

    def through(self, model: TracedTransformer, z: torch.Tensor, bias_only: bool = False) -> torch.Tensor:
        """Heads `[batch, seq, heads, head_dim]` through W_O, apart from the running forward pass."""
        out = model._module.get_submodule(self.path)
        batch, seq, heads, width = z.shape
        interleaver = model.interleaver
        running, interleaver.interleaving = interleaver.interleaving, False
        try:
            bias = self.project(model, z.new_zeros(1, 1, heads * width))
            if bias_only:
                return bias
            weight = getattr(out, "weight", None)
            plain = type(out) is nn.Linear and self.before is None
            if isinstance(weight, torch.Tensor) and weight.device.type == "meta":  # offloaded
                plain = False
            if plain and isinstance(weight, torch.Tensor) and weight.shape[1] == heads * width:
                return torch.einsum("bshd,ohd->bsho", z, weight.view(-1, heads, width).to(z.device))
            alone = z.new_zeros(heads, batch, seq, heads, width)
            index = torch.arange(heads, device=z.device)
            alone[index, :, :, index] = z.permute(2, 0, 1, 3)
            made = self.project(model, alone.reshape(heads * batch, seq, heads * width)) - bias
            return made.view(heads, batch, seq, -1).permute(1, 2, 0, 3)
        finally:
            interleaver.interleaving = running

    def project(self, model: TracedTransformer, x: torch.Tensor) -> torch.Tensor:
        """`[batch, seq, heads × head_dim]` to what W_O returns of it."""
        if self.before is not None:
            path, shape = self.before
            x = model._module.get_submodule(path)(x.reshape(*x.shape[:2], *shape)).flatten(2)
        return model._module.get_submodule(self.path)(x)

    def __str__(self) -> str:
        first = "" if self.before is None else f"{self.before[0]} and "
        return f"each head of {self.heads}, through {first}{self.path}"


def unflattened(model: TracedTransformer, tensor: torch.Tensor) -> torch.Tensor:
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


def reflattened(model: TracedTransformer, tensor: torch.Tensor, was: torch.Tensor) -> torch.Tensor:
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
