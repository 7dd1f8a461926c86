"""Taking over the results of an earlier run that was made in the same way."""

from __future__ import annotations

from pathlib import Path

from nnterp.identity import differences
from nnterp.prompts._results import PromptResults
from nnterp.warn import warn

_NAMED = 5  # differences that a message names


def take_over(results: PromptResults, earlier: PromptResults | str | Path) -> None:
    """Copy what an earlier run of the same prompts has computed.

    Args:
        results: The results of this run.
        earlier: The results of the earlier one, or the folder they were saved to.

    Raises:
        ValueError: The earlier run had other settings, another function, other arguments of it, another model or other
            weights, prompts or targets.
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
    """Raise if an earlier run was made in another way, and warn if attributes of a callable object differ.

    Raises:
        ValueError: It was.
    """
    if "weights" not in earlier.settings:
        raise ValueError(
            f"Cannot resume: {where} was written by a version that did not record the function's arguments and the "
            f"model's weights, so it is not known whether they are the same. Start anew without it."
        )
    serious, attributes = differences(earlier.settings, results.settings)
    if serious:
        raise ValueError(
            f"Cannot resume: {where} was run with {'; with '.join(serious[:_NAMED])}. Repeat the earlier "
            f"call, or start anew without it."
        )
    if attributes:
        warn(
            f"Resuming, although {where} was run with {'; with '.join(attributes[:_NAMED])}. If this changes what the "
            f"function returns, start anew."
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
