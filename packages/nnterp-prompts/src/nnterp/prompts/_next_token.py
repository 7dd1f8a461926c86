"""`next_token_probs`: the model's own next-token distribution, or the probabilities of targets in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from nnterp import StandardizedTransformer
from nnterp.inputs import batches, encode
from nnterp.prompts._questions import Question
from nnterp.prompts._readout import ask, last_probabilities


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
        targets: For each prompt a list of targets, each a list of token ids whose probabilities are added up. All
            prompts need the same number of targets.

    Returns:
        `[prompts, vocab]`, or `[prompts, targets]` if `targets` is given; float32 on the CPU.

    Raises:
        ValueError: `targets` has not one entry for each prompt.
        InsideTraceError: Called inside a trace of the model.
    """
    model.require_no_trace("next_token_probs()")
    rows = encode(model, prompts)
    if targets is not None and len(targets) != len(rows):
        raise ValueError(f"targets has {len(targets)} entries for {len(rows)} prompts; give one for each.")
    parts: list[torch.Tensor | None] = [None] * len(rows)
    for batch in batches(model, rows, len(rows)):
        if targets is None:
            found = last_probabilities(model, batch, remote)
        else:
            asked = [[Question(len(rows[i]) - 1, tuple(dict.fromkeys(t))) for t in targets[i]] for i in batch.indices]
            found = ask(model, batch, asked, remote)[0].exp().view(len(batch), -1)
        for i, part in zip(batch.indices, found, strict=True):
            parts[i] = part
    return torch.stack(parts)


next_token_probs.reduces_targets = True  # type: ignore[attr-defined]


def next_token_probs_unsqueeze(
    nn_model: StandardizedTransformer, prompt: Any, remote: Any = False, **_kwargs: Any
) -> torch.Tensor:
    """Return `next_token_probs` with an axis for layers, which 1.x needed for `run_prompts`.

    Returns:
        `[prompts, 1, vocab]`, float32 on the CPU.
    """
    return next_token_probs(nn_model, prompt, remote).unsqueeze(1)
