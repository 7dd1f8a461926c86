"""Read what each part adds to a logit from a result of direct logit attribution."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from nnterp.display._results.labelled import (
    LabelledResult,
    main_tensor,
    require_result,
    title_of,
    token_namer,
    tokens_at,
)
from nnterp.display._results.picking import choose_prompt, is_mean, pick
from nnterp.token_text import visible


@dataclass(frozen=True)
class DirectScores:
    """What `plot_direct_attribution` draws of a result.

    Attributes:
        values: `[parts]`, what each adds.
        parts: Their names.
        score: What they add to.
        title: The figure's title.
    """

    values: np.ndarray
    parts: list[str]
    score: str
    title: str


def direct_scores(given: Any, choose: Mapping[str, Any], prompt: int | None = None) -> DirectScores:
    """The result's main tensor over parts, positions or tokens, for one prompt or the mean.

    Args:
        given: The result.
        choose: For each further axis, the label to draw, or "mean".
        prompt: Which prompt to draw, by its index.

    Raises:
        TypeError: `given` is no result.
        ValueError: It has no such axis; several prompts and none was chosen; or the mean was chosen of scores by
            position or token, which are not the same thing in each prompt.
        IndexError: There is no such prompt.
    """
    result = require_result(given, "plot_direct_attribution")
    name = main_tensor(result)
    along = next((axis for axis in ("parts", "positions", "tokens") if axis in result.axes[name]), None)
    if along is None:
        raise ValueError(
            f"{name} has axes {', '.join(result.axes[name])}; direct attribution is drawn of parts, positions or "
            "tokens."
        )
    choose = choose_prompt(result, name, choose, prompt)
    mean = is_mean(result, "prompts", choose)
    if mean and along != "parts" and len(result.labels["prompts"]) > 1:
        raise ValueError(
            f"The mean over prompts of scores by {along.removesuffix('s')} is of different tokens in each: draw one "
            "with prompt=i."
        )
    picked = pick(result, name, choose, along)
    row = picked.taken.get("prompts", 0)
    kept = ~np.isnan(picked.array) if along != "parts" else np.ones(len(picked.array), bool)
    names = [text for text, here in zip(_names(result, along, row), kept, strict=True) if here]
    values = picked.array[kept]
    if along != "parts" and "bias" in result.tensors:
        names.append("bias")
        values = np.append(values, pick(result, "bias", {k: v for k, v in choose.items() if k == "prompts"}).array)
    score = "logit difference" if "wrong_ids" in result.tensors else "logit"
    several = len(result.labels["prompts"]) > 1
    which = "" if not several else " (mean over prompts)" if mean else f" (prompt {result.labels['prompts'][row]})"
    return DirectScores(values, names, score, title_of(result, f"Direct attribution of the {score}{which}"))


def _names(result: LabelledResult, along: str, prompt: int) -> list[str]:
    """The name of each part, position (with its token) or token."""
    if along == "parts":
        return [str(label) for label in result.labels["parts"]]
    if along == "positions":
        tokens = tokens_at(result, prompt) or [""] * len(result.labels["positions"])
        return [f"{i} {visible(token)}" for i, token in zip(result.labels["positions"], tokens, strict=True)]
    namer = token_namer(result, None)
    ids = [int(token) for token in result.tensors["source_ids"][prompt]]
    return [namer(token) if token >= 0 else "" for token in ids]
