"""Functions that return probabilities, and sums over the tokens of a target."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch

from nnterp.prompts._ids import distinct_ids


def reduces_targets(get_probs: Callable[..., Any]) -> bool:
    """True if a function accepts `targets=` and returns their probabilities instead of the whole vocabulary.

    A function declares this with an attribute `reduces_targets = True`. A `functools.partial` or a decorated function
    inherits the declaration from the function it wraps.
    """
    while hasattr(get_probs, "func") and not hasattr(get_probs, "reduces_targets"):
        get_probs = get_probs.func
    return bool(
        getattr(inspect.unwrap(get_probs), "reduces_targets", False) or getattr(get_probs, "reduces_targets", False)
    )


def sum_of_tokens(probs: torch.Tensor, tokens: Sequence[int], what: str) -> torch.Tensor:
    """Sum the last axis over distinct tokens, `[..., vocab]` → `[...]`, on the device of `probs`.

    Raises:
        TypeError: A token is not an integer.
        ValueError: A token is outside the vocabulary.
    """
    wanted = distinct_ids(tokens, what, probs.shape[-1])
    return probs[..., torch.tensor(wanted, dtype=torch.long, device=probs.device)].sum(-1)
