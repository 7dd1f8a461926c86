"""Two protocols: what a place can do, and what it needs of the model that is running. Imported for types only."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from nnsight import Envoy
from torch import nn

Rest = tuple[int | str | None, ...] | None  # see `Readout.returns`
Lender = tuple[int, list[int], str]  # (layer, the later layers that borrow from it, what they borrow)


class Running(Protocol):
    """What a place, a readout or an edit needs of the model in whose forward pass it acts."""

    num_layers: int
    num_vision_layers: int
    model_class: str
    layer_paths: tuple[str, ...]
    runs: Any
    interleaver: Any
    lenders: list[Lender]
    readout: Any
    layers_input: Any
    layers_output: Any
    _module: nn.Module
    path: str  # of the model in nnsight's tree
    tokenizer: Any
    standing: tuple

    def envoy(self, path: str) -> Envoy:
        """The envoy of the module at a native path."""
        ...

    def place(self, name: str, layer: int | tuple[int, int] | str | None = None) -> Place:
        """Where a value is served."""
        ...

    def module_path(self, role: str, layer: int) -> str:
        """Native path of the module that plays a role in a layer."""
        ...


class Place(Protocol):
    """Where a value is served in one model; `label` is what errors call the value."""

    def read(self, model: Running, label: str) -> torch.Tensor:
        """The value in the running forward pass."""
        ...

    def write(self, model: Running, tensor: torch.Tensor, label: str) -> None:
        """Replace the value by a tensor of its shape, dtype and device."""
        ...

    def __str__(self) -> str: ...
