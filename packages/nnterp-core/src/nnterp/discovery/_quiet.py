"""Run a plain module for a look at it, and leave it as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


@contextlib.contextmanager
def quiet(module: nn.Module) -> Iterator[None]:
    """In evaluation mode and without gradients.

    When the block ends, every module's training flag, the random state of the CPU, and the states that modules keep on
    themselves (RecurrentGemma) are as they were.
    """
    training = [m for m in module.modules() if m.training]
    before = [(m, dict(vars(m))) for m in module.modules()]
    for m in training:
        m.training = False
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            yield
    finally:
        for m in training:
            m.training = True
        for m, attributes in before:
            for name in held_tensors(m):
                if name in attributes:
                    m.__dict__[name] = attributes[name]
                else:
                    del m.__dict__[name]


def held_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Floating tensors that a module holds and that are neither parameters nor buffers."""
    return {name: x for name, x in vars(module).items() if isinstance(x, torch.Tensor) and x.is_floating_point()}


@contextlib.contextmanager
def static_experts(model: nn.Module) -> Iterator[None]:
    """Run mixtures of experts in the one implementation whose shapes do not depend on which experts are chosen."""
    before = getattr(getattr(model, "config", None), "_experts_implementation", None)
    switch = getattr(model, "set_experts_implementation", None)
    if before is None or switch is None:
        yield
        return
    switch("batched_mm")
    try:
        yield
    finally:
        switch(before)
