"""Where a model takes its inputs, wherever its weights are kept."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


def device_of(module: nn.Module, first: Iterable[nn.Module | None]) -> torch.device:
    """The device of the first of some modules whose weights are there, or of any weight of the model.

    Offloaded weights are on `meta` until their module runs, and then where the rest computes.
    """
    for part in first:
        for parameter in part.parameters() if part is not None else ():
            if parameter.device.type != "meta":
                return parameter.device
    found = next((p.device for p in module.parameters() if p.device.type != "meta"), None)
    return found if found is not None else torch.device("cpu")


def input_device(module: nn.Module) -> torch.device:
    """Where token ids belong."""
    declared = getattr(module, "get_input_embeddings", None)
    return device_of(module, [declared() if declared is not None else None])
