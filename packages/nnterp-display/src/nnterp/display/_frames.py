"""Tables as pandas DataFrames: prompts, top tokens, certificates, the names of a model's modules."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from nnterp.display._arrays import as_array, check_probabilities
from nnterp.token_text import TokenNames

if TYPE_CHECKING:
    from nnterp import Anatomy, Certificate


def prompts_to_df(prompts: Iterable[Any], tokenizer: Any = None) -> pd.DataFrame:
    """Prompts with their targets, a column for each prompt.

    Args:
        prompts: `nnterp.prompts.Prompt` objects (anything with `prompt`, `target_strings` and `target_tokens`).
        tokenizer: Adds the target tokens, as the tokenizer spells them.

    Returns:
        Rows `prompt`, `<target>_string`, and with a tokenizer `<target>_tokens`.

    Example:
        asked = [Prompt.from_strings("The capital of France is", {"right": "Paris"}, model)]
        frame = display.prompts_to_df(asked, model.tokenizer)
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
    """The `k` most probable tokens of each prompt and layer, a row for each token.

    Args:
        next_token_probs: `[prompts, layers, vocab]`, `[layers, vocab]` or `[vocab]`, as `logit_lens` returns.
        tokenizer: Names the tokens, with spaces visible as in the figures.
        k: How many tokens.

    Returns:
        Columns prompt_index, layer, rank (from 1), id, token, probability.

    Raises:
        ValueError: `next_token_probs` does not hold probabilities, or `k` is not between 1 and the size of the
            vocabulary.

    Example:
        frame = display.top_tokens_to_df(logit_lens(model, prompts), model.tokenizer, k=3)
    """
    probs = as_array(next_token_probs, "next_token_probs ([prompts, layers, vocab])", 1, 2, 3)
    probs = probs.reshape((1,) * (3 - probs.ndim) + probs.shape)
    check_probabilities(probs, "next_token_probs")
    if not 1 <= k <= probs.shape[-1]:
        raise ValueError(f"k goes from 1 to {probs.shape[-1]}, the size of the vocabulary, not {k}.")
    ids = np.argsort(-probs, axis=-1, kind="stable")[..., :k]
    names = TokenNames(tokenizer)
    rows = [
        {
            "prompt_index": p,
            "layer": i,
            "rank": j + 1,
            "id": int(ids[p, i, j]),
            "token": names(int(ids[p, i, j])),
            "probability": probs[p, i, ids[p, i, j]],
        }
        for p, i, j in np.ndindex(*ids.shape)
    ]
    return pd.DataFrame(rows)


def certificate_to_df(certificate: Certificate) -> pd.DataFrame:
    """Make a table of the lines of a certificate.

    Returns:
        A row for each line, with columns claim, status, error, tolerance, detail; error and tolerance are float64, NaN
        where a line has none.

    Example:
        frame = display.certificate_to_df(model.certificate)
        print("failed" in set(frame.status))  # → False
    """
    rows = [(line.name, line.status, line.error, line.tolerance, line.detail) for line in certificate.lines]
    frame = pd.DataFrame(rows, columns=["claim", "status", "error", "tolerance", "detail"])
    return frame.astype({"error": float, "tolerance": float})


def anatomy_to_df(anatomy: Anatomy) -> pd.DataFrame:
    """Make a table of the modules of a model.

    Returns:
        A row for each module, with columns name (nnterp's) and native (the path in the model).

    Example:
        print(display.anatomy_to_df(model.anatomy).columns.tolist())  # → ['name', 'native']
    """
    return pd.DataFrame(list(anatomy.names()), columns=["name", "native"])
