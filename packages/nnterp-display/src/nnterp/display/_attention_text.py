"""Attention over a text, on a page with a picker of layers and heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from nnterp.display._arrays import axis_labels
from nnterp.display._patterns import future, is_causal, read_pattern
from nnterp.display._view import View, as_written

MOST_NUMBERS = 3_000_000


def plot_attention_text(
    pattern: Any,
    tokens: Sequence[Any] | None = None,
    tokenizer: Any = None,
    *,
    layers: Sequence[Any] | None = None,
    heads: Sequence[Any] | None = None,
    title: str | None = None,
    prompt: int | None = None,
    weighted: bool = False,
    show: bool = False,
) -> View:
    """A text with one head's attention: each token is shaded by how much the token under the mouse attends to it.

    Click the small picture of a head's pattern to choose the head (as in CircuitsVis, Cooney and Nanda 2022). Click a
    token to keep it. A button switches to the opposite direction: which queries attend to the token.

    Args:
        pattern: `[query, key]`, `[heads, query, key]` or `[layers, heads, query, key]`; or a result that holds such a
            tensor.
        tokens: The tokens of the keys, as ids or texts. If there are fewer queries, they are the last of these tokens.
        tokenizer: Names tokens that are given as ids.
        layers, heads: Labels; 0, 1, … if None.
        title: Plain text.
        prompt: For a result of several prompts, which one to draw, by its index.
        weighted: The numbers are probabilities times norms of values; shades then go from 0 to the largest number.
        show: Also show the view, in a notebook or a browser.

    Returns:
        A `View`: a page that `nnterp.display.save` writes. For a causal pattern it holds only keys up to the query.

    Raises:
        ValueError: `pattern` does not hold probabilities, labels do not fit their axis, or there are more than
            3,000,000 numbers.
        IndexError: There is no such prompt.

    Example:
        >>> import torch
        >>> from nnterp import display
        >>> view = display.plot_attention_text(torch.eye(3), ["The", " sky", " is"], title="Attention to itself")
        >>> "The" in view.page()
        True
    """
    read = read_pattern("plot_attention_text", pattern, tokens, tokenizer, layers, heads, prompt, weighted)
    probs = read.values.reshape((1,) * (4 - read.values.ndim) + read.values.shape)
    causal = is_causal(probs)
    kept = probs[..., ~future(probs)] if causal else probs.reshape(*probs.shape[:2], -1)
    if kept.size > MOST_NUMBERS:
        raise ValueError(
            f"Attention of {' × '.join(map(str, probs.shape))} is {kept.size:,} numbers; a page can carry "
            f"{MOST_NUMBERS:,}. Choose layers: pattern[4:8]."
        )
    largest = float(np.nanmax(probs)) if read.weighted else 1.0
    data = {
        "tokens": read.tokens,
        "layers": axis_labels(read.layers, probs.shape[0], "layers", "the layer axis of pattern"),
        "heads": axis_labels(read.heads, probs.shape[1], "heads", "the head axis of pattern"),
        "shape": list(probs.shape),
        "causal": causal,
        "weighted": read.weighted,
        "most": largest or 1.0,
        "values": as_written(np.nan_to_num(kept)),
    }
    view = View("Attention" if title is None else title, "attention.js", data)
    if show:
        view.show()
    return view
