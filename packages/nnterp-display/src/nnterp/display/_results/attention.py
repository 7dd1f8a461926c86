"""Read attention patterns from a result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nnterp.display._results.labelled import describe_tensors, require_result, token_rows, tokens_at
from nnterp.display._results.picking import at_prompt, pick


@dataclass(frozen=True)
class Patterns:
    """What `plot_attention` draws of a result.

    Attributes:
        values: `[query, key]`, with heads and layers in front of them if the result has several.
        tokens: The token at each key.
        layers, heads: Labels of these axes, None if `values` does not have them.
    weighted: Whether `values` are probabilities times something, and no probabilities themselves.
    """

    values: np.ndarray
    tokens: list[str]
    layers: Sequence[Any] | None
    heads: Sequence[Any] | None
    weighted: bool = False


def patterns(given: Any, prompt: int | None = None) -> Patterns:
    """The first tensor of a result whose last axes are queries and keys, of one prompt.

    Raises:
        TypeError: `given` is no result.
        ValueError: It has no such tensor, another axis with several labels, or several prompts and none was chosen.
        IndexError: There is no such prompt.
    """
    result = require_result(given, "plot_attention")
    endings = (("queries", "keys"), ("query", "key"))
    name = next((name for name in result.tensors if tuple(result.axes[name])[-2:] in endings), None)
    if name is None:
        raise ValueError(
            f"This result has no tensor whose last axes are queries and keys; it has {describe_tensors(result)}."
        )
    query, key = tuple(result.axes[name])[-2:]
    picked = pick(result, name, at_prompt(prompt), "layers", "heads", query, key)
    labels = {axis: list(result.labels[axis]) for axis in picked.axes}
    at, array = picked.taken.get("prompts", 0), picked.array
    tokens = tokens_at(result, at) or list(map(str, result.labels[key]))
    rows = token_rows(result)
    if rows and array.shape[-2:] == (len(tokens), len(tokens)):  # a shorter prompt than another
        size = len(tokens) - rows[min(at, len(rows) - 1)].count(None)
        array, tokens = array[..., :size, :size], tokens[:size]
    return Patterns(array, tokens, labels.get("layers"), labels.get("heads"), name == "weighted")
