"""Reading and checking what a user gives as directions."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from nnterp.inputs import Row


def read_directions(given: Any, num_layers: int | None) -> dict[int, torch.Tensor]:
    """Layer → direction `[hidden]`, float32 copies on the CPU, in the order of layers.

    Args:
        given: Mapping from layer to tensor, array or list of numbers.
        num_layers: Layers of the model, if known; negative layers then count from the last.

    Raises:
        TypeError: It is no such mapping.
        ValueError: It is empty, a direction is not finite or not `[hidden]`, or widths differ.
        IndexError: The model has no such layer.
    """
    if not isinstance(given, Mapping):
        raise TypeError(f"Directions are a mapping from layer to [hidden], not a {type(given).__name__}.")
    found: dict[int, torch.Tensor] = {}
    for key, value in given.items():
        layer = _layer(key, num_layers)
        if layer in found:
            raise ValueError(f"There are two directions for layer {layer}.")
        found[layer] = _direction(value, layer)
    if not found:
        raise ValueError("There is no direction: give one for at least one layer.")
    widths = {layer: len(direction) for layer, direction in found.items()}
    if len(set(widths.values())) > 1:
        raise ValueError(f"Directions of one vector have one width; these have (layer: width) {widths}.")
    return {layer: found[layer] for layer in sorted(found)}


def _layer(key: Any, num_layers: int | None) -> int:
    if isinstance(key, bool) or not hasattr(key, "__index__"):
        raise TypeError(f"A layer is an integer, not {key!r}.")
    layer = key.__index__()
    if num_layers is None:
        if layer < 0:
            raise IndexError(f"Layer {layer} counts from the last layer, but the model is not known: pass model=.")
        return layer
    if not -num_layers <= layer < num_layers:
        raise IndexError(f"There is no layer {layer}; the model has {num_layers} layers, from 0 to {num_layers - 1}.")
    return layer % num_layers


def _direction(value: Any, layer: int) -> torch.Tensor:
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"The direction of layer {layer} is a {type(value).__name__}; give [hidden] numbers.") from None
    if tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"The direction of layer {layer} has dtype {tensor.dtype}; give real numbers.")
    if tensor.dim() != 1 or not len(tensor):
        raise ValueError(f"The direction of layer {layer} has shape {list(tensor.shape)}; it must be [hidden].")
    direction = tensor.detach().to("cpu", torch.float32, copy=True)
    if not torch.isfinite(direction).all():
        raise ValueError(f"The direction of layer {layer} is not finite in float32.")
    return direction


def number(value: Any, what: str) -> float:
    """A finite real number as a float.

    Raises:
        TypeError: It is no number.
        ValueError: It is not finite.
    """
    if isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_complex():
        value = value.item()
    if isinstance(value, (bool, complex)) or not hasattr(value, "__float__"):
        raise TypeError(f"{what} is a number, not a {type(value).__name__}.")
    found = float(value)
    if not math.isfinite(found):
        raise ValueError(f"{what} must be finite, not {found}.")
    return found


def hash_of(*groups: Sequence[Row]) -> str:
    """SHA-256 of groups of prompts, by what tells them apart: their token ids, and what else the model reads."""
    return hashlib.sha256(json.dumps([[list(row.identity) for row in rows] for rows in groups]).encode()).hexdigest()
