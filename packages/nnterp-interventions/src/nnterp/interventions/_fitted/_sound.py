"""Whether maps make a lens. What comes from a file or from a user's hands is looked at before it is copied or used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from nnterp.indices import integer

KINDS = ("tuned", "jacobian")


def require_map(given: Any, shape: tuple[int, ...], what: str) -> None:
    """Raise unless it is a dense tensor of floating point numbers of one shape, all of which it holds itself.

    It is not copied before: a file of some bytes can hold a tensor that repeats one number more often than fits in
    memory.

    Raises:
        ValueError: It is something else; `what` names it.
    """
    if not isinstance(given, torch.Tensor):
        raise ValueError(f"{what} is no tensor but {type(given).__name__}.")
    if tuple(given.shape) != shape:
        raise ValueError(f"{what} has shape {list(given.shape)}, not {list(shape)}.")
    if given.layout != torch.strided or given.is_meta or not given.is_floating_point():
        kind = f"{given.layout}, {given.dtype}, on {given.device}".replace("torch.", "")
        raise ValueError(f"{what} is no dense tensor of floating point numbers: {kind}.")


def read_maps(given: Mapping[int, torch.Tensor], what: str) -> dict[int, torch.Tensor]:
    """Tensors by layer: float32 copies on the CPU, in the order of layers; `what` says what they are.

    Raises:
        TypeError: A layer is no integer.
        ValueError: One is no dense tensor of numbers, or they are of different shapes.
    """
    layers = sorted(integer(layer, "a layer of a lens") for layer in given)
    for layer in layers:
        own, first = given[layer], given[layers[0]]
        require_map(own, tuple(getattr(first, "shape", ())), f"The {what} of layer {layer}")
    return {layer: given[layer].detach().float().cpu() for layer in layers}


def require_sound(
    kind: Any, weights: dict[int, torch.Tensor], biases: dict[int, torch.Tensor], maps_to: int, num_layers: int
) -> None:
    """Raise unless maps and biases, as `read_maps` returns them, make a lens of a model of `num_layers` layers.

    Raises:
        ValueError: They do not; says why.
    """
    if kind not in KINDS:
        raise ValueError(f"A lens is of kind {' or '.join(map(repr, KINDS))}, not {kind!r:.80}.")
    if not weights:
        raise ValueError("A lens needs a map for at least one layer.")
    width = next(iter(weights.values())).shape[-1:].numel()
    for layer, weight in weights.items():
        if tuple(weight.shape) != (width, width) or not width:
            raise ValueError(f"The map of layer {layer} has shape {list(weight.shape)}, not [{width}, {width}].")
        if not torch.isfinite(weight).all() or not torch.isfinite(biases.get(layer, weight)).all():
            raise ValueError(f"The map of layer {layer} is not finite.")
        if not 0 <= layer < maps_to < num_layers:
            raise ValueError(
                f"There is a map for layer {layer}, but a lens to layer {maps_to} of {num_layers} takes maps for "
                f"layers 0 to {maps_to - 1}."
            )
    for layer, bias in biases.items():
        if layer not in weights or tuple(bias.shape) != (width,):
            raise ValueError(f"The bias of layer {layer} has shape {list(bias.shape)}, not [{width}].")


def require_details(details: Any) -> None:
    """Raise unless what a file says of a fit can be used: where the maps lead to, and what they were worth.

    Raises:
        ValueError: It cannot; says what is wrong.
    """
    if not isinstance(details, dict):
        raise ValueError(f"Its details are no dictionary but {type(details).__name__}.")
    for name in ("maps_to", "skip_first"):
        if not isinstance(details.get(name, 0), int) or isinstance(details.get(name), bool):
            raise ValueError(f"{name} is {details[name]!r:.80}, and not an integer.")
    report = details.get("report", {})
    each = report.get("layers", {}) if isinstance(report, dict) else None
    whole = isinstance(each, dict) and all(
        layer.isdecimal() and isinstance(own, dict) and all(_is_number(own.get(k)) for k in ("lens", "logit_lens"))
        for layer, own in each.items()
    )
    if not whole:
        raise ValueError("Its report is none: it has no numbers for the lens and the logit lens at each layer.")


def _is_number(given: Any) -> bool:
    return isinstance(given, (int, float)) and not isinstance(given, bool)
