"""The tokens and values of a tokens figure, from a result with one value per position."""

from __future__ import annotations

from typing import Any

import numpy as np

from nnterp.display._results import pick, require_result, tokens_at


def values_of_result(given: Any, name: str, prompt: int | None) -> tuple[list[str], np.ndarray, str]:
    """Token texts, the value at each token, and what the value is called: `name`, or for "value" the tensor's name.

    Raises:
        ValueError: The result does not carry its tokens, or its main tensor has another axis with several labels.
        IndexError: There is no such prompt.
        TypeError: It is no result.
    """
    result = require_result(given, "plot_tokens")
    main = next(iter(result.tensors))
    picked = pick(result, main, {}, "positions", prompt=prompt)
    tokens = tokens_at(result, picked.taken.get("prompts", 0))
    if tokens is None:
        raise ValueError("This result does not carry its tokens; give plot_tokens(tokens, values).")
    kept = [i for i, token in enumerate(tokens) if token]
    return [tokens[i] for i in kept], picked.values[kept], main if name == "value" else name
