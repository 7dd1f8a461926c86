"""Distributions that hold NaN or infinite values: they give NaN, and a warning says for how many prompts."""

from __future__ import annotations

import torch

from nnterp.prompts._errors import MissingScoresWarning
from nnterp.warn import warn


def without_broken(probs: torch.Tensor) -> torch.Tensor:
    """Return distributions `[..., vocab]` in which one NaN or infinite value makes all values NaN."""
    broken = ~probs.sum(-1, keepdim=True, dtype=torch.promote_types(probs.dtype, torch.float32)).isfinite()
    return probs.masked_fill(broken, torch.nan) if broken.any() else probs


def warn_of_missing(missing: torch.Tensor, consequence: str) -> None:
    """Warn if prompts have no score.

    Args:
        missing: True where there is no score; the first axis is that of prompts.
        consequence: What is done with these prompts, a sentence.
    """
    per_prompt = missing.flatten(1).any(1) if missing.dim() > 1 else missing
    if count := int(per_prompt.sum()):
        layers = " in at least one layer" if missing.dim() > 1 and not missing.all() else ""
        warn(
            f"{count} of {len(per_prompt)} prompts have no score{layers}: the model's logits, or the probabilities of "
            f"get_probs_func, are NaN or infinite. {consequence}",
            MissingScoresWarning,
        )
