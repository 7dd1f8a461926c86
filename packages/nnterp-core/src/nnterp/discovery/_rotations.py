"""Lengths after which rotary embeddings turn every row differently, because the longest row of the batch is longer.

transformers picks LongRoPE's factors, and stretches `dynamic` ones, by the largest position of a batch. A rotary module
has no weights, so a fresh one is built from its config and asked what it gives a short row beside a longer one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from nnterp.huggingface import text_config
from nnterp.traced import Sharing, fresh_rotations

FARTHEST = 1 << 24  # no model is made for as many positions; float32 still counts them
Turned = Callable[[int], list[torch.Tensor]]  # from the longest row's length to what a short row is turned by


def rotation_sharing(module: nn.Module) -> Sharing:
    """Which rows the rotary embeddings of a model let share a batch."""
    limit: int | None = None
    switches: set[int] = set()
    for turned in _rotations(module):
        first, last = turned(2), turned(FARTHEST)
        low = 2
        while not _equal(first, last):
            switch = _last_equal(turned, first, low)
            after = turned(switch + 1)
            if not _equal(after, turned(switch + 2)) and not _equal(after, last):  # it goes on changing
                limit = switch if limit is None else min(limit, switch)
                break
            switches.add(switch)
            first, low = after, switch + 1
    return Sharing(limit, tuple(sorted(s for s in switches if limit is None or s < limit)))


def _rotations(module: nn.Module) -> Iterator[Turned]:
    """One function for each kind of rotary embedding in a model, and each of its types of layers."""
    seen, text = [], type(text_config(module.config))
    for inner in module.modules():
        if not any("inv_freq" in name for name, _ in inner.named_buffers(recurse=False)):
            continue
        if type(getattr(inner, "config", None)) is not text:  # those of images turn patches, not tokens
            continue
        kind = (type(inner), id(getattr(inner, "config", None)))
        if kind in seen:
            continue
        seen.append(kind)
        with torch.device("cpu"):
            fresh = _fresh(inner)
            if fresh is None:
                continue
            typed = "layer_type" in inspect.signature(fresh.forward).parameters
            layer_types = getattr(fresh, "layer_types", None) or getattr(fresh.config, "layer_types", None) or ()
            for options in [{"layer_type": name} for name in dict.fromkeys(layer_types)] if typed else [{}]:
                turned = _turning(fresh, options)
                if turned is not None:
                    yield turned


def _fresh(inner: nn.Module) -> Any:
    """A rotary module like this one, on the CPU; None if its class is not built from a config alone."""
    try:
        return type(inner)(inner.config)
    except Exception:
        return None


def _turning(rotary: Any, options: dict[str, Any]) -> Turned | None:
    """What a row of two tokens is turned by, beside a row of a given length; None if it is not asked in this way."""
    x = torch.zeros(2, 2, 1)

    def turned(longest: int, sections: bool) -> list[torch.Tensor]:
        positions = torch.tensor([[0, 1], [0, longest - 1]])
        with torch.no_grad(), torch.device("cpu"):
            fresh_rotations(rotary)
            made = rotary(x, positions.expand(3, 2, 2) if sections else positions, **options)
        given = made if isinstance(made, (tuple, list)) else (made,)
        return [t[..., 0, :, :].clone() if t.shape[-3] == 2 else t[0].clone() for t in given]

    for sections in (False, True):
        try:
            turned(2, sections)
        except Exception:
            continue
        return lambda longest, sections=sections: turned(longest, sections)  # type: ignore[misc]
    return None


def _last_equal(turned: Turned, first: list[torch.Tensor], low: int) -> int:
    """The longest row beside which a short one is still turned by `first`."""
    high = FARTHEST
    while high - low > 1:
        middle = (low + high) // 2
        if _equal(turned(middle), first):
            low = middle
        else:
            high = middle
    return low


def _equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
