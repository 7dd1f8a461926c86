"""How a run was made, and taking over the results of an earlier run that was made in the same way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nnterp import StandardizedTransformer
from nnterp.prompts._results import PromptResults


def settings_of(
    model: StandardizedTransformer,
    scoring: str,
    normalize_length: bool,
    get_probs: Callable[..., Any] | None,
    kwargs: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Return what distinguishes a run from other runs of the same prompts."""
    function = getattr(get_probs, "func", get_probs)
    simple = (bool, int, float, str, type(None))
    return {
        "scoring": scoring,
        "normalize_length": normalize_length,
        "get_probs_func": None if get_probs is None else getattr(function, "__qualname__", type(function).__qualname__),
        "func_kwargs": {
            key: value if isinstance(value, simple) else type(value).__name__ for key, value in (kwargs or {}).items()
        },
        "model_class": model.anatomy.model_class,
        "model": model.repo_id or "",
    }


def take_over(results: PromptResults, earlier: PromptResults | str | Path) -> None:
    """Copy what an earlier run of the same prompts has computed.

    Args:
        results: The results of this run.
        earlier: The results of the earlier one, or the folder they were saved to.

    Raises:
        ValueError: The earlier run had other settings, prompts or targets.
        FileNotFoundError: There are no results in the folder.
    """
    where = "the results to resume from" if isinstance(earlier, PromptResults) else str(earlier)
    if not isinstance(earlier, PromptResults):
        earlier = PromptResults.load(earlier)
    _check_settings(results, earlier, where)
    _check_prompts(results, earlier, where)
    for i in earlier.done.nonzero().flatten().tolist():
        if not results.done[i]:
            results.pending.pop(i, None)
            ranks = None if earlier.vocabulary_ranks is None else earlier.vocabulary_ranks[i]
            results._record(i, earlier.log_probs[i], ranks)
    for i, rows in earlier.pending.items():
        if not results.done[i]:
            results.pending[i] = {**results.pending.get(i, {}), **rows}
    results._fill()


def _check_settings(results: PromptResults, earlier: PromptResults, where: str) -> None:
    """Raise if an earlier run was made with other settings.

    Raises:
        ValueError: It was.
    """
    for key, value in results.settings.items():
        if earlier.settings.get(key) != value:
            raise ValueError(
                f"Cannot resume: {where} was run with {key}={earlier.settings.get(key)!r}, and this run has {value!r}. "
                f"Repeat the earlier call, or start anew without it."
            )


def _check_prompts(results: PromptResults, earlier: PromptResults, where: str) -> None:
    """Raise if an earlier run had other prompts or targets.

    Raises:
        ValueError: It had.
    """
    if earlier.categories != results.categories or len(earlier.texts) != len(results.texts):
        raise ValueError(
            f"Cannot resume: {where} has {len(earlier.texts)} prompts with {list(earlier.categories)}, and this run "
            f"has {len(results.texts)} with {list(results.categories)}. Pass the same prompts in the same order."
        )
    for i, (theirs, ours) in enumerate(zip(earlier.fingerprints, results.fingerprints, strict=True)):
        if theirs != ours:
            raise ValueError(
                f"Cannot resume: prompt {i} of {where} is {earlier.texts[i]!r:.80}, and in this run it is "
                f"{results.texts[i]!r:.80} or has other targets. Pass the same prompts in the same order."
            )
