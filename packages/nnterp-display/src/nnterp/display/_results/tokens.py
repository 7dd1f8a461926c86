"""Read one value per token from a result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from nnterp.display._results.labelled import main_tensor, require_result, tokens_at
from nnterp.display._results.picking import at_prompt, pick


@dataclass(frozen=True)
class TokenValues:
    """What `plot_tokens` draws of a result: tokens, one value for each `[positions]`, and the values' name."""

    tokens: list[str]
    values: np.ndarray
    name: str


def token_values(given: Any, prompt: int | None = None) -> TokenValues:
    """The result's main tensor over the positions of one prompt; positions past its end are left out.

    Raises:
        TypeError: `given` is no result.
        ValueError: The result has no tokens, another axis with several labels, or several prompts and none was chosen.
        IndexError: There is no such prompt.
    """
    result = require_result(given, "plot_tokens")
    name = main_tensor(result)
    picked = pick(result, name, at_prompt(prompt), "positions")
    tokens = tokens_at(result, picked.taken.get("prompts", 0))
    if tokens is None:
        raise ValueError("This result does not carry its tokens; give plot_tokens(tokens, values).")
    kept = [i for i, token in enumerate(tokens) if token]
    return TokenValues([tokens[i] for i in kept], picked.array[kept], name)
