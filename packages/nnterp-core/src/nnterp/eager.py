"""Computing attention the way that has its probabilities as a tensor."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn


def attention_configs(module: nn.Module) -> Iterator[Any]:
    """Every config object that says how attention is computed, once each."""
    found: set[int] = set()
    for part in module.modules():
        config = part.__dict__.get("config")
        if config is not None and id(config) not in found and hasattr(config, "_attn_implementation_internal"):
            found.add(id(config))
            yield config


def is_eager(module: nn.Module) -> bool:
    """Whether attention is computed eagerly."""
    return all(config._attn_implementation_internal in ("eager", None) for config in attention_configs(module))


def make_eager(module: nn.Module) -> None:
    """Compute attention eagerly from now on.

    Written into the configs themselves: `set_attn_implementation` refuses models that do not use transformers' table of
    attention functions (Falcon), although their own code asks the config at every call.
    """
    for config in attention_configs(module):
        config._attn_implementation_internal = "eager"


@contextlib.contextmanager
def eagerly(module: nn.Module) -> Iterator[None]:
    """Compute attention eagerly inside the block."""
    kept = [(config, config._attn_implementation_internal) for config in attention_configs(module)]
    try:
        make_eager(module)
        yield
    finally:
        for config, implementation in kept:
            config._attn_implementation_internal = implementation
