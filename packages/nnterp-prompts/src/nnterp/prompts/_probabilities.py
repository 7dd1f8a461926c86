"""What functions return as probabilities: checked, and summed over the tokens of a target."""

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


def check_probabilities(get_probs: Callable[..., Any], values: Any, prompts: int, targets: int | None) -> torch.Tensor:
    """Return what a `get_probs_func` returned, if they are probabilities.

    NaN and infinite values are no error, as they come from the model: a target with one, and a whole distribution with
    one, is NaN in what is returned.

    Args:
        get_probs: The function, for messages.
        values: What it returned.
        prompts: Number of prompts it was given.
        targets: Number of targets it was given; None if it was to return the whole vocabulary.

    Raises:
        ValueError: The shape is not `[prompts, layers, last]` or `[prompts, last]`, a value is outside 0 to 1, or a
            distribution over the vocabulary does not add up to 1.
    """
    name = getattr(get_probs, "__name__", None) or repr(get_probs)
    _check_shape(name, values, prompts, targets)
    half = values.is_floating_point() and values.dtype.itemsize < 4
    tolerance = 2e-2 if half else 1e-3
    low, high = values.float().aminmax(dim=-1) if values.dtype == torch.bool else values.aminmax(dim=-1)
    wrong = (low < -tolerance) | (high > 1 + tolerance)
    totals = None
    if targets is None:
        totals = values.sum(-1, dtype=torch.promote_types(values.dtype, torch.float32))
        wrong |= (totals - 1).abs() > tolerance
    broken = ~(low.isfinite() & high.isfinite())
    wrong &= ~broken
    if wrong.any():
        first = tuple(wrong.nonzero()[0].tolist())
        where = f"prompt {first[0]} of the batch" + (f", layer {first[1]}" if len(first) > 1 else "")
        total = "" if totals is None else f", and they add up to {totals[first].item():.4g}"
        raise ValueError(
            f"{name!r} did not return probabilities: for {where}, the values go from {low[first].item():.4g} to "
            f"{high[first].item():.4g}{total}. Probabilities are between 0 and 1 and add up to 1 over the vocabulary. "
            f"Return logits.softmax(-1) for logits, log_probs.exp() for log-probabilities."
        )
    if not broken.any():
        return values
    return values.masked_fill(~values.isfinite() if targets else broken[..., None], torch.nan)


def _check_shape(name: str, values: Any, prompts: int, targets: int | None) -> None:
    """Raise unless `values` is a real tensor `[prompts, layers, last]` or `[prompts, last]`.

    Raises:
        ValueError: It is not.
    """
    if isinstance(values, torch.Tensor):
        fits = values.dim() in (2, 3) and values.shape[0] == prompts and values.numel() > 0
        if fits and not values.is_complex() and targets in (None, values.shape[-1]):
            return
    got = f"shape {list(values.shape)}" if isinstance(values, torch.Tensor) else f"a {type(values).__name__}"
    got += f" of {values.dtype}" if isinstance(values, torch.Tensor) and values.is_complex() else ""
    wanted = "vocab" if targets is None else f"categories = {targets}"
    raise ValueError(
        f"{name!r} returned {got} for {prompts} prompts; [prompts, layers, {wanted}] or [prompts, {wanted}] was "
        f"expected."
    )
