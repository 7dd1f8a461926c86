"""Tables as pandas DataFrames: prompts, top tokens, a certificate, an anatomy."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from nnterp.display._arrays import top_tokens
from nnterp.token_text import TokenNames

if TYPE_CHECKING:
    from nnterp import Anatomy, Certificate


def prompts_to_df(prompts: Iterable[Any], tokenizer: Any = None) -> pd.DataFrame:
    """Prompts with their targets, one column per prompt and one row per field.

    The rows are `prompt`, `<target>_string` for each target, and with a tokenizer `<target>_tokens`.

    Args:
        prompts: `nnterp.prompts.Prompt` objects (anything with `prompt`, `target_strings` and `target_tokens`).
        tokenizer: Names the target tokens, as the tokenizer itself writes them.
    """
    columns: dict[int, dict[str, Any]] = {}
    for i, prompt in enumerate(prompts):
        column: dict[str, Any] = {"prompt": prompt.prompt}
        for name, text in (prompt.target_strings or {}).items():
            column[f"{name}_string"] = text
        if tokenizer is not None:
            for name, tokens in prompt.target_tokens.items():
                column[f"{name}_tokens"] = tokenizer.convert_ids_to_tokens(list(tokens))
        columns[i] = column
    return pd.DataFrame.from_dict(columns)


def top_tokens_to_df(next_token_probs: Any, tokenizer: Any, k: int = 5) -> pd.DataFrame:
    """The `k` most probable tokens of each prompt and layer, a row each: prompt, layer, rank, id, token, probability.

    Args:
        next_token_probs: `[prompts, layers, vocab]`, `[layers, vocab]` or `[vocab]`, as `logit_lens` returns.
        tokenizer: Names the tokens; they are shown as in the figures, spaces visible.
        k: How many tokens.

    Raises:
        ValueError: These are no probabilities over the vocabulary, or `k` is not between 1 and its size.
    """
    best, ids = top_tokens(next_token_probs, k)
    names = TokenNames(tokenizer)
    rows = [
        {
            "prompt": p,
            "layer": i,
            "rank": j + 1,
            "id": int(ids[p, i, j]),
            "token": names(int(ids[p, i, j])),
            "probability": best[p, i, j],
        }
        for p, i, j in np.ndindex(*ids.shape)
    ]
    return pd.DataFrame(rows)


def certificate_to_df(certificate: Certificate) -> pd.DataFrame:
    """The lines of a certificate, a row each: claim, status, error, tolerance, detail."""
    rows = [(line.name, line.status, line.error, line.tolerance, line.detail) for line in certificate.lines]
    frame = pd.DataFrame(rows, columns=["claim", "status", "error", "tolerance", "detail"])
    return frame.astype({"error": float, "tolerance": float})


def anatomy_to_df(anatomy: Anatomy) -> pd.DataFrame:
    """The names of a model's modules, a row each: standard name, native path."""
    return pd.DataFrame(list(anatomy.names()), columns=["name", "native"])
