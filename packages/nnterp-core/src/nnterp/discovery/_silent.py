"""Weights that are all zero, and running a model with random numbers in their place.

A part that adds zeros to the stream shows neither where it adds them nor what it reads. What is proven of a model is
proven of its code, so a pruned or freshly initialised projection is proven with random numbers in its place.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from nnterp.discovery._linears import is_linear

SAMPLE = 64  # entries that are looked at before all are
_NUMBER = re.compile(r"\.\d+(?=\.|$)")


@dataclass(frozen=True)
class Silent:
    """One tensor of a model that is all zero.

    Attributes:
        name: As in `named_parameters` or `named_buffers`.
        tensor: The tensor.
        like: A tensor of the same name in another layer that is not zero; None if there is none.
        gate: Whether it is a factor, not a matrix or the weight of a norm: what it is then shows in the proof.
    """

    name: str
    tensor: torch.Tensor
    like: torch.Tensor | None = None
    gate: bool = False


def silent_weights(root: nn.Module) -> list[Silent]:
    """The matrices, factors and norms' weights of a model that are all zero; biases are left out."""
    found: dict[int, Silent] = {}
    sounding: dict[str, torch.Tensor] = {}
    for path, module in root.named_modules():
        for name, tensor in _weights_of(module):
            full = f"{path}.{name}" if path else name
            if id(tensor) in found:
                continue
            if is_zero(tensor):
                norm = "norm" in type(module).__name__.lower()
                found[id(tensor)] = Silent(full, tensor, gate=tensor.dim() < 2 and not norm)
            else:
                sounding.setdefault(f"{_NUMBER.sub('.*', full)} {tuple(tensor.shape)}", tensor)
    return [
        Silent(s.name, s.tensor, sounding.get(f"{_NUMBER.sub('.*', s.name)} {tuple(s.tensor.shape)}"), s.gate)
        for s in found.values()
    ]


def _weights_of(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in module._parameters.items():
        if tensor is not None and not name.endswith("bias"):
            yield name, tensor
    for name, buffer in module._buffers.items() if is_linear(module) else ():  # quantised weights are buffers
        index = buffer is not None and not buffer.is_floating_point() and buffer.dtype not in (torch.int8, torch.uint8)
        if buffer is not None and buffer.dim() > 1 and not index and not name.endswith("bias"):
            yield name, buffer


def is_zero(tensor: torch.Tensor) -> bool:
    """Whether all entries of a tensor are zero; False for one that is not here, or that cannot be asked."""
    if tensor.device.type == "meta" or not tensor.numel():
        return False
    try:
        values = tensor.detach()
        if type(tensor) not in (nn.Parameter, torch.Tensor) and hasattr(values, "dequantize"):
            values = values.dequantize()
        flat = values.reshape(-1)
        return not bool(flat[:: max(1, flat.numel() // SAMPLE)].any()) and not bool(flat.any())
    except (RuntimeError, NotImplementedError, TypeError):
        return False


@contextlib.contextmanager
def sounding(root: nn.Module, silent: list[Silent]) -> Iterator[None]:
    """Run the block with random numbers in place of weights that are all zero; the model's own are put back."""
    drawn = {id(s.tensor): _drawn(s, seed) for seed, s in enumerate(silent)}
    replaced = [
        (held, name, tensor)
        for module in (root.modules() if silent else ())
        for held in (module._parameters, module._buffers)
        for name, tensor in held.items()
        if tensor is not None and id(tensor) in drawn
    ]
    try:
        for held, name, tensor in replaced:
            held[name] = drawn[id(tensor)]
        yield
    finally:
        for held, name, tensor in replaced:
            held[name] = tensor


@torch.no_grad()
def _drawn(silent: Silent, seed: int) -> torch.Tensor:
    """What stands in for one tensor: numbers like those of its namesake in another layer, or of order one."""
    tensor, like = silent.tensor, silent.like
    generator = torch.Generator(tensor.device).manual_seed(seed)
    if not tensor.is_floating_point():
        return torch.randint(1, 100, tensor.shape, generator=generator, device=tensor.device).to(tensor.dtype)
    noise = torch.randn(tensor.shape, generator=generator, device=tensor.device)
    if tensor.dim() < 2:
        noise = 0.5 + torch.rand(tensor.shape, generator=generator, device=tensor.device)
    elif like is not None and like.is_floating_point() and type(like) is type(tensor):
        noise = noise * like.detach().float().std()
    else:
        noise = noise / tensor.shape[-1] ** 0.5
    drawn = noise.to(tensor.dtype)
    return nn.Parameter(drawn, requires_grad=False) if isinstance(tensor, nn.Parameter) else drawn
