"""The experts of a mixture: which are chosen, their weights, and what each returns for the tokens sent to it.

Transformers computes all experts in one module, which is given the tokens, for each token the chosen experts and their
weights, and returns the weighted sum. What one expert returns is no tensor of that forward pass (it depends on the
implementation whether it ever is). It is what the same module returns when it is given one expert for each token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch

from nnterp.errors import ShapeError
from nnterp.record import Record
from nnterp.traced._apart import Apart
from nnterp.traced._places import with_argument
from nnterp.traced._views import in_every_row, reflattened, unflattened

if TYPE_CHECKING:
    from nnterp.traced._running import Running

Key = int | str  # a position, or a keyword
Which = Literal["outputs", "contributions"]


class Given(Record):
    """An argument of a module, as the module is given it: the rows of all invokes, in the model's own shape."""

    def __init__(self, path: str, key: Key) -> None:
        self.path, self.key = path, key

    def read(self, model: Running, label: str) -> torch.Tensor:
        """The model's own tensor."""
        return argument(*inputs_of(model, self.path), self.key)

    def write(self, model: Running, tensor: torch.Tensor, label: str) -> None:
        """Replace it."""
        args, kwargs = inputs_of(model, self.path)
        envoy = model.envoy(self.path)
        in_every_row(lambda: setattr(envoy, "inputs", with_argument(args, kwargs, self.key, tensor)))

    def __str__(self) -> str:
        return f"{self.path}.inputs, argument {self.key}"


class Routed(Record):
    """An argument of the experts' module, one row for each token: the chosen experts, or their weights.

    Attributes:
        path: The module.
        key: The argument.
        factor: What the mixture multiplies its experts' sum by.
    """

    def __init__(self, path: str, key: Key, factor: float = 1.0) -> None:
        self.path, self.key, self.factor = path, key, factor

    def read(self, model: Running, label: str) -> torch.Tensor:
        """`[batch, seq, chosen]`, a view of the model's own tensor unless there is a factor."""
        shown = by_token(model, Given(self.path, self.key).read(model, label), label)
        return shown if self.factor == 1.0 else shown * self.factor

    def write(self, model: Running, tensor: torch.Tensor, label: str) -> None:
        """Replace it."""
        given = Given(self.path, self.key)
        tensor = tensor if self.factor == 1.0 else tensor / self.factor
        given.write(model, reflattened(model, tensor, given.read(model, label)), label)

    def __str__(self) -> str:
        return f"{'' if self.factor == 1.0 else f'{self.factor:g} × '}{self.path}.inputs, argument {self.key}"


class Experts(Record):
    """What each expert returns for each token that is sent to it.

    Attributes:
        path: The experts' module.
        keys: Its arguments: the tokens, the chosen experts, their weights.
        which: "outputs", by the experts that were chosen; or "contributions", by all experts, each output times its
            weight and zero for the tokens that were not sent to the expert.
        count: Attribute of the module that says how many experts there are, or that holds a matrix for each.
        factor: What the mixture multiplies the contributions' sum by; contributions include it.
        columns: How many experts the module must be given for each token.
    """

    def __init__(
        self,
        path: str,
        keys: tuple[Key, Key, Key],
        which: Which,
        count: str,
        factor: float = 1.0,
        columns: int = 1,
    ) -> None:
        self.path, self.keys, self.which, self.count, self.factor = path, keys, which, count, factor
        self.columns = columns

    def read(self, model: Running, label: str) -> torch.Tensor:
        """`[batch, seq, chosen or experts, hidden]`; a new tensor."""
        args, kwargs = inputs_of(model, self.path)
        whole = [argument(args, kwargs, key) for key in self.keys]
        tokens, chosen, weights = (by_token(model, t.reshape(-1, t.shape[-1]), label) for t in whole)
        factor = weights if self.which == "contributions" else torch.ones_like(weights)
        each = tokens.repeat_interleave(chosen.shape[-1], 1).flatten(0, 1)
        routed = one_column(chosen.flatten(), factor.flatten(), self.columns)
        given = each.reshape(*(1,) * (whole[0].dim() - 2), *each.shape), *routed
        for key, tensor in zip(self.keys, given, strict=True):
            args, kwargs = with_argument(args, kwargs, key, tensor)
        with Apart(model.interleaver):
            made = model._module.get_submodule(self.path)(*args, **kwargs)
        made = made.reshape(*chosen.shape, -1)
        made = made if self.factor == 1.0 else made * self.factor
        if self.which == "outputs":
            return made
        index = chosen.to(made.device)[..., None].expand_as(made)
        experts = counted(model, self.path, self.count)
        return made.new_zeros(*chosen.shape[:2], experts, made.shape[-1]).scatter_add(2, index, made)

    def write(self, model: Running, tensor: torch.Tensor, label: str) -> None:
        """Make the module return their sum: of outputs, the weighted sum."""
        if self.which == "outputs":
            weights = Routed(self.path, self.keys[2]).read(model, label)
            tensor = tensor * weights.to(tensor.device)[..., None]
        put_sum(model, self.path, tensor.sum(2) / self.factor)

    def __str__(self) -> str:
        one = "each chosen expert" if self.which == "outputs" else "each expert, times its weight"
        return f"{one} of {self.path}, run apart on the tokens sent to it"


class EveryExpert(Record):
    """What a module returns that runs every expert on every token, one expert after the other (Llama 4).

    Attributes:
        path: The module; it returns `[experts × tokens, hidden]`.
        count: As in `Experts`.
    """

    def __init__(self, path: str, count: str) -> None:
        self.path, self.count = path, count

    def read(self, model: Running, label: str) -> torch.Tensor:
        """`[batch, seq, experts, hidden]`, a view of the model's own tensor."""
        envoy = model.envoy(self.path)
        made = in_every_row(lambda: envoy.output)
        experts = counted(model, self.path, self.count)
        return by_token(model, made.unflatten(0, (experts, -1)).transpose(0, 1), label)

    def write(self, model: Running, tensor: torch.Tensor, label: str) -> None:
        """Replace it."""
        envoy = model.envoy(self.path)
        experts = counted(model, self.path, self.count)
        current = in_every_row(lambda: envoy.output).unflatten(0, (experts, -1)).transpose(0, 1)
        new = reflattened(model, tensor, current).transpose(0, 1).flatten(0, 1)
        in_every_row(lambda: setattr(envoy, "output", new))

    def __str__(self) -> str:
        return f"{self.path}.output (stored as [experts × batch × seq, hidden])"


def one_column(chosen: torch.Tensor, weights: torch.Tensor, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One expert for each token and its weight, both `[tokens, columns]`; further columns repeat it without weight."""
    padded = weights[:, None] * torch.eye(columns, device=weights.device, dtype=weights.dtype)[0]
    return chosen[:, None].repeat(1, columns), padded


def counted(model: Running, path: str, name: str) -> int:
    """How many experts a module has."""
    held = getattr(model._module.get_submodule(path), name)
    return held if isinstance(held, int) else held.shape[0]


def inputs_of(model: Running, path: str) -> tuple[tuple, dict[str, Any]]:
    """What a module is called with, the rows of all invokes."""
    envoy = model.envoy(path)
    return in_every_row(lambda: envoy.inputs)


def argument(args: tuple, kwargs: dict[str, Any], key: Key) -> torch.Tensor:
    """One of the arguments."""
    return kwargs[key] if isinstance(key, str) else args[key]


def by_token(model: Running, tensor: torch.Tensor, label: str) -> torch.Tensor:
    """`[tokens, ...]` of all invokes as `[batch, seq, ...]` of this one.

    Raises:
        ShapeError: There are not equally many tokens in each row.
    """
    shown = unflattened(model, tensor)
    if shown.dim() == tensor.dim():
        raise ShapeError(f"{label}: the experts are given {tensor.shape[0]} tokens, which is no whole number of rows.")
    return shown


def put_sum(model: Running, path: str, total: torch.Tensor) -> None:
    """Make a module return `[batch, seq, hidden]` for the rows of this invoke."""
    envoy = model.envoy(path)
    current = in_every_row(lambda: envoy.output)
    new = reflattened(model, total.to(current), current.reshape(-1, current.shape[-1])).reshape(current.shape)
    in_every_row(lambda: setattr(envoy, "output", new))
