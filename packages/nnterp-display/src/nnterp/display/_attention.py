"""Attention patterns: one head, or a wall of heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from nnterp.display._attention_head import draw_head
from nnterp.display._attention_pattern import checked_pattern, pattern_of_result
from nnterp.display._attention_wall import draw_wall
from nnterp.display._grid import check_same
from nnterp.display._results import is_numbers, refuse_choices
from nnterp.display._text import as_names
from nnterp.display._theme import shown


def plot_attention(
    pattern: Any,
    tokens: Sequence[Any] | None = None,
    tokenizer: Any = None,
    *,
    layers: Sequence[Any] | None = None,
    heads: Sequence[Any] | None = None,
    prompt: int | None = None,
    title: str | None = None,
    show: bool = False,
) -> go.Figure:
    """Attention probabilities: query position down, key position across.

    Args:
        pattern: `[query, key]` for one head with its tokens on both axes, `[heads, query, key]` for a wall of one
            layer's heads, `[layers, heads, query, key]` for a wall of layers × heads; or a result object that holds
            such a tensor.
        tokens: The tokens of the keys, as ids or texts. If there are fewer queries than keys, the queries are the last
            of these tokens.
        tokenizer: Names tokens that are given as ids.
        layers, heads: Labels; 0, 1, … if None.
        prompt: For a result of several prompts, the index of the one to draw.
        title: Plain text.
        show: Also show the figure, in a notebook or a browser.

    Returns:
        The figure. Cells above the diagonal are blank if all of them are zero, as in a causal model.

    Raises:
        ValueError: These are no probabilities, labels do not fit, or the wall has more than 300,000 cells.
        IndexError: The result has no prompt `prompt`.
        TypeError: `pattern` is neither numbers nor a result.
    """
    if not is_numbers(pattern):
        own = pattern_of_result(pattern, prompt)
        pattern, tokens = own.values, own.tokens if tokens is None else tokens
        layers, heads = own.layers if layers is None else layers, own.heads if heads is None else heads
    else:
        refuse_choices("plot_attention", {} if prompt is None else {"prompt": prompt})
    probs = checked_pattern(pattern)
    keys = probs.shape[-1]
    names = [str(i) for i in range(keys)] if tokens is None else as_names(tokens, tokenizer)
    check_same("tokens", len(names), keys, "the key axis of pattern")
    figure = draw_head(probs, names, title) if probs.ndim == 2 else draw_wall(probs, names, layers, heads, title)
    return shown(figure, show)
