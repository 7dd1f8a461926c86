"""Questions answered by a user's `get_probs_func`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from nnterp import StandardizedTransformer
from nnterp.inputs import Batch, as_given
from nnterp.prompts._probabilities import check_probabilities, reduces_targets, sum_of_tokens
from nnterp.prompts._questions import Question


def ask_function(
    get_probs: Callable[..., torch.Tensor],
    model: StandardizedTransformer,
    batch: Batch,
    asked: Sequence[Sequence[Question]],
    plain: bool,
    remote: Any,
    kwargs: Mapping[str, Any],
) -> list[torch.Tensor]:
    """Return, for each row, the log-probabilities of its questions, `[questions]` or `[layers, questions]`.

    They are NaN where the function returned NaN or infinite values.

    Args:
        get_probs: The function; see `run_prompts`. It is only asked about the token after a row's last one.
        model: The model.
        batch: The rows.
        asked: For each row its questions.
        plain: Give the function texts instead of token ids, if every row has one.
        remote: Passed to the function.
        kwargs: Passed to the function.

    Raises:
        ValueError: The function returned something else than probabilities; see `check_probabilities`.
    """
    if reduces_targets(get_probs):
        found = _ask_for_targets(get_probs, model, batch, asked, remote, kwargs)
    else:
        texts = [row.text for row in batch.rows]
        prompts = (
            texts
            if plain and None not in texts and batch.encoder is None
            else [as_given(model, row) for row in batch.rows]
        )
        values = get_probs(model, prompts, remote=remote, **kwargs)
        values = check_probabilities(get_probs, values, len(batch), None)
        found = [
            torch.stack([sum_of_tokens(row, question.tokens, "A target") for question in questions], dim=-1)
            for row, questions in zip(values, asked, strict=True)
        ]
    return [row.detach().cpu().double().clamp(min=0).log() for row in found]


def _ask_for_targets(
    get_probs: Callable[..., torch.Tensor],
    model: StandardizedTransformer,
    batch: Batch,
    asked: Sequence[Sequence[Question]],
    remote: Any,
    kwargs: Mapping[str, Any],
) -> list[torch.Tensor]:
    """Return the probabilities of each row's questions from a function that takes `targets`."""
    # Every row needs the same number of targets: a row with fewer repeats its first, and the surplus is dropped.
    most = max(map(len, asked))
    targets = [
        [list((questions[k] if k < len(questions) else questions[0]).tokens) for k in range(most)]
        for questions in asked
    ]
    if "progress" in inspect.signature(get_probs).parameters:
        kwargs = {"progress": False, **kwargs}  # the run shows its own bar, or none
    values = get_probs(model, [as_given(model, row) for row in batch.rows], remote=remote, targets=targets, **kwargs)
    values = check_probabilities(get_probs, values, len(batch), most)
    return [row[..., : len(questions)] for row, questions in zip(values, asked, strict=True)]
