"""Run a plain module without changing its state."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from nnterp.traced import fresh_rotations


@contextlib.contextmanager
def quiet(module: nn.Module) -> Iterator[None]:
    """Run the block with the module in evaluation mode and without gradients.

    At the end, every module's training flag, the CPU's random state, and the tensors that modules keep as plain
    attributes (RecurrentGemma's states) are restored. Rotary embeddings that stretch with the input (`dynamic`) begin
    every forward pass afresh, and at the end.
    """
    training = [m for m in module.modules() if m.training]
    before = [(m, dict(vars(m))) for m in module.modules()]
    stretching = any("dynamic" in str(getattr(m, "rope_type", "")) for m in module.modules())
    afresh = module.register_forward_pre_hook(lambda m, _: fresh_rotations(m)) if stretching else None
    for m in training:
        m.training = False
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            yield
    finally:
        if afresh is not None:
            afresh.remove()
            fresh_rotations(module)
        for m in training:
            m.training = True
        for m, attributes in before:
            for name in held_tensors(m):
                if name in attributes:
                    m.__dict__[name] = attributes[name]
                else:
                    del m.__dict__[name]


def held_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Attribute name → floating tensor, for those that are neither parameters nor buffers."""
    return {name: x for name, x in vars(module).items() if isinstance(x, torch.Tensor) and x.is_floating_point()}


@contextlib.contextmanager
def static_experts(model: nn.Module) -> Iterator[None]:
    """Run mixtures of experts as batched products, whose shapes do not depend on which experts are chosen.

    At the end, the model's own implementation is restored.
    """
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
