"""`next_token_probs`: the model's own next-token distribution, or the probabilities of targets in it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from nnterp import StandardizedTransformer
from nnterp.defaults import plain_defaults
from nnterp.deprecation import renamed
from nnterp.inputs import batches, encode
from nnterp.plain_nnsight import takes_nnsight_models
from nnterp.prompts._ids import distinct_ids
from nnterp.prompts._missing import warn_of_missing
from nnterp.prompts._questions import Question, Tokens
from nnterp.prompts._readout import ask, last_probabilities


@takes_nnsight_models
def next_token_probs(
    model: StandardizedTransformer,
    prompts: Any,
    remote: Any = False,
    targets: Sequence[Sequence[Sequence[int]]] | None = None,
) -> torch.Tensor:
    """Return the model's next-token distribution after each prompt, or the probabilities of targets in it.

    Args:
        model: The model.
        prompts: A text, token ids, chat messages, or a list of these.
        remote: Passed to the trace.
        targets: For each prompt a list of targets, each a list of token ids whose probabilities are added up (an id
            that is given twice counts once). All prompts need the same number of targets.

    Returns:
        `[prompts, vocab]`, or `[prompts, targets]` if `targets` is given; float32 on the CPU. A prompt for which the
        model's logits are NaN or infinite is NaN, and a `MissingScoresWarning` counts such prompts.

    Raises:
        ValueError: `targets` has not one entry for each prompt, prompts have different numbers of targets, a target has
            no tokens, or one outside the vocabulary.
        TypeError: A target is not a list of integers.
        InsideTraceError: Called inside a trace of the model.

    Example:
        probabilities = next_token_probs(model, prompts)  # [prompts, vocab]
        print(model.tokenizer.decode(probabilities[0].argmax()))  # → Paris
    """
    with plain_defaults():
        model.require_no_trace("next_token_probs()")
        rows = encode(model, prompts, images=True)
        wanted = None if targets is None else _target_groups(model, targets, len(rows))
        parts: list[torch.Tensor | None] = [None] * len(rows)
        for batch in batches(model, rows, len(rows)):
            if wanted is None:
                found = last_probabilities(model, batch, remote)
            else:
                asked = [[Question(len(rows[i]) - 1, tokens) for tokens in wanted[i]] for i in batch.indices]
                found = ask(model, batch, asked, remote)[0].exp().view(len(batch), -1)
            for i, part in zip(batch.indices, found, strict=True):
                parts[i] = part
        probs = torch.stack(parts)  # type: ignore[arg-type]
        warn_of_missing(probs.isnan().any(-1), "Their probabilities are NaN.")
        return probs


def _target_groups(model: StandardizedTransformer, targets: Any, prompts: int) -> list[list[Tokens]]:
    """Return the distinct token ids of each target of each prompt.

    Raises:
        TypeError: A target is not a list of integers.
        ValueError: There is not one list of targets for each prompt, these have different lengths, a target has no
            tokens, or one outside the vocabulary.
    """
    if isinstance(targets, torch.Tensor):
        targets = list(targets)
    if isinstance(targets, (str, bytes)) or not isinstance(targets, Sequence):
        raise TypeError(f"targets is {targets!r:.80} ({type(targets).__name__}); give one list for each prompt.")
    if len(targets) != prompts:
        raise ValueError(f"targets has {len(targets)} entries for {prompts} prompts; give one for each.")
    groups = []
    for i, own in enumerate(targets):
        if isinstance(own, (str, bytes)) or not isinstance(own, Iterable):
            raise TypeError(f"targets of prompt {i} are {own!r:.80}; give a list of lists of token ids.")
        what = f"A target of prompt {i}"
        groups.append([distinct_ids(tokens, what, model.vocab_size) for tokens in own])
        if not groups[i] or not all(groups[i]):
            raise ValueError(f"targets of prompt {i} are empty; give at least one token.")
        if len(groups[i]) != len(groups[0]):
            raise ValueError(
                f"Prompt 0 has {len(groups[0])} targets and prompt {i} has {len(groups[i])}; all need the same number."
            )
    return groups


next_token_probs.reduces_targets = True  # type: ignore[attr-defined]


@renamed(removed_in="3.0", prompt="prompts")
def next_token_probs_unsqueeze(
    nn_model: StandardizedTransformer, prompts: Any, remote: Any = False, **_kwargs: Any
) -> torch.Tensor:
    """Return `next_token_probs` with an axis for layers, which 1.x needed for `run_prompts`.

    Args:
        nn_model: The model.
        prompts: As in `next_token_probs`. The name that it had, `prompt=`, works with a warning.
        remote: Passed to the trace.

    Returns:
        `[prompts, 1, vocab]`, float32 on the CPU.

    Example:
        probabilities = next_token_probs_unsqueeze(model, prompts)  # [prompts, 1, vocab]
    """
    return next_token_probs(nn_model, prompts, remote).unsqueeze(1)
