"""Places of values in vLLM's modules, whose tensors are `[seq, ...]`, with heads on one flat axis.

A stream may be two tensors that vLLM adds up later. Every read returns a copy `[1, seq, ...]`, because vLLM's fused
kernels overwrite what modules return. A write replaces the whole tensor.
"""

from __future__ import annotations

from typing import Any

import torch

from nnterp.record import Record
from nnterp.traced import Running


def floats(args: tuple, kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The floating point tensors that a module was given."""
    return [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor) and t.is_floating_point()]


def tensors_of(output: Any, label: str) -> list[torch.Tensor]:
    """The floating point tensors that a module returned.

    Raises:
        TypeError: There are none.
    """
    found = floats(tuple(output) if isinstance(output, (tuple, list)) else (output,), {})
    if not found:
        raise TypeError(f"{label}: the module returned a {type(output).__name__} without a floating point tensor.")
    return found


def stream(found: list[torch.Tensor]) -> list[torch.Tensor]:
    """The one or two tensors whose sum is the stream: vLLM may hand on a layer's output before it is added."""
    return found[:2] if len(found) > 1 and found[1].shape == found[0].shape else found[:1]


def shown(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with a batch axis."""
    return (tensor if tensor.dim() > 2 and tensor.shape[0] == 1 else tensor[None]).clone()


class _Stream(Record):
    def __init__(self, path: str) -> None:
        self.path = path

    def parts(self, model: Running, label: str) -> list[torch.Tensor]:
        raise NotImplementedError

    def read(self, model: Running, label: str) -> torch.Tensor:
        """The stream, `[1, seq, hidden]`."""
        return shown(torch.stack(parts).sum(0) if len(parts := self.parts(model, label)) > 1 else parts[0])

    def write(self, model: Running, tensor: torch.Tensor, label: str) -> None:
        """Write into the first tensor and set the other one to zero, in place, so that their sum is `tensor`."""
        carried, *rest = self.parts(model, label)
        carried.copy_(tensor.reshape(carried.shape))
        for waiting in rest:
            waiting.zero_()


class StreamIn(_Stream):
    """The stream that a module is given."""

    def parts(self, model: Running, label: str) -> list[torch.Tensor]:
        """The tensors whose sum it is."""
        return stream(floats(*model.envoy(self.path).inputs))

    def __str__(self) -> str:
        return f"the sum of {self.path}.inputs"


class StreamOut(_Stream):
    """The stream that a module returns."""

    def parts(self, model: Running, label: str) -> list[torch.Tensor]:
        """The tensors whose sum it is."""
        return stream(tensors_of(model.envoy(self.path).output, label))

    def __str__(self) -> str:
        return f"the sum of {self.path}.output"


class Given(Record):
    """The first tensor, or the one at an index, that a module is given."""

    def __init__(self, path: str, index: int = 0, heads: int | None = None) -> None:
        self.path, self.index, self.heads = path, index, heads

    def read(self, model: Running, label: str) -> torch.Tensor:
        """`[1, seq, ...]`."""
        return _split(shown(floats(*model.envoy(self.path).inputs)[self.index]), self.heads)

    def write(self, model: Running, tensor: torch.Tensor, label: str) -> None:
        """Replace it for this module."""
        envoy = model.envoy(self.path)
        args, kwargs = envoy.inputs
        current = floats(args, kwargs)[self.index]
        new = tensor.reshape(current.shape)
        envoy.inputs = (
            tuple(new if arg is current else arg for arg in args),
            {name: new if arg is current else arg for name, arg in kwargs.items()},
        )

    def __str__(self) -> str:
        return f"{self.path}.inputs, floating point tensor {self.index}"


class Returned(Record):
    """The first tensor that a module returns."""

    def __init__(self, path: str) -> None:
        self.path = path

    def read(self, model: Running, label: str) -> torch.Tensor:
        """`[1, seq, ...]`."""
        return shown(tensors_of(model.envoy(self.path).output, label)[0])

    def write(self, model: Running, tensor: torch.Tensor, label: str) -> None:
        """Replace it."""
        envoy = model.envoy(self.path)
        output = envoy.output
        current = tensors_of(output, label)[0]
        new = tensor.reshape(current.shape)
        envoy.output = new if output is current else type(output)(new if one is current else one for one in output)

    def __str__(self) -> str:
        return f"{self.path}.output"


def _split(tensor: torch.Tensor, heads: int | None) -> torch.Tensor:
    return tensor if heads is None else tensor.flatten(2).unflatten(-1, (heads, -1))


class Scaled(Record):
    """What a module returns, times a factor that is an attribute of the module around it."""

    def __init__(self, path: str, owner: str, factor: str) -> None:
        self.path, self.owner, self.factor = path, owner, factor

    def read(self, model: Running, label: str) -> torch.Tensor:
        """`[1, seq, ...]`."""
        return Returned(self.path).read(model, label) * self._number(model)

    def write(self, model: Running, tensor: torch.Tensor, label: str) -> None:
        """Replace what the module returns."""
        Returned(self.path).write(model, tensor / self._number(model), label)

    def _number(self, model: Running) -> Any:
        return getattr(model._module.get_submodule(self.owner), self.factor)

    def __str__(self) -> str:
        return f"{self.path}.output × {self.owner}.{self.factor}"
