"""Loss and surprise per token."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go

from nnterp.arguments import count
from nnterp.display._arrays import as_array, number
from nnterp.display._predicted import predicted
from nnterp.display._text import escape
from nnterp.display._theme import shown
from nnterp.display._tokens import plot_tokens
from nnterp.token_text import TokenNames, shorten


def plot_surprise(
    logits: Any,
    tokens: Any,
    tokenizer: Any = None,
    *,
    top_k: int = 5,
    limits: tuple[float, float] | None = None,
    title: str | None = None,
    show: bool = False,
) -> go.Figure:
    """A text, each token coloured by its surprise (its loss): −log of the probability that the model gave it, in nats.

    Args:
        logits: `[positions, vocab]`, the model's logits (or log-probabilities) at each position of the text.
        tokens: `[positions]`, the ids of the text's tokens. The first is predicted by nothing and has no surprise.
        tokenizer: Names the tokens.
        top_k: How many of the tokens that the model expected are listed on hovering.
        limits: The lowest and the highest surprise of the colour scale; 0 and the largest if None.
        title: Plain text; if None, it says the mean loss and the perplexity.
        show: Also show the figure, in a notebook or a browser.

    Returns:
        The figure. Hovering says a token's surprise, probability and rank, the entropy of the prediction, and what was
        expected instead.

    Raises:
        ValueError: There are fewer than two tokens, `logits` has not one row for each token or holds probabilities, or
            an id is not in the vocabulary.

    Example:
        >>> import torch
        >>> from nnterp import display
        >>> figure = display.plot_surprise(torch.zeros(3, 8), [1, 2, 3])
        >>> figure.layout.title.text
        'Loss 2.079 nats per token (perplexity 8)'
    """
    ids = tokens.tolist() if hasattr(tokens, "tolist") else list(tokens)
    rows = as_array(logits, "logits ([positions, vocab])", 2)
    if len(ids) < 2 or len(rows) != len(ids):
        raise ValueError(f"logits has {len(rows)} positions and tokens {len(ids)}; give as many of each, at least 2.")
    read = predicted(rows[:-1], ids[1:], count(top_k, "top_k"), "logits ([positions, vocab])")
    names = TokenNames(tokenizer)
    surprise = np.concatenate([[np.nan], -read.own])
    loss = float(-read.own.mean())
    if title is None:
        title = f"Loss {loss:.3f} nats per token (perplexity {np.exp(loss):.4g})"
    figure = plot_tokens(
        ids,
        surprise,
        tokenizer,
        name="surprise (nats)",
        limits=(0.0, max(float(np.nanmax(surprise)), 1e-9)) if limits is None else limits,
        title=title,
    )
    hover = [f"position 0  {escape(names(ids[0]))}<br>predicted by nothing"]
    for i, token in enumerate(read.ids.tolist()):
        lines = [
            f"position {i + 1}  {escape(shorten(names(token), 40))}",
            f"surprise {number(-read.own[i])} nats, probability {number(np.exp(read.own[i]))}, rank {read.ranks[i]:,}",
            f"entropy {number(read.entropy[i])} nats; expected",
            *(
                f"{rank}. {escape(shorten(names(other), 40))}  {number(float(np.exp(value)))}"
                for rank, (other, value) in enumerate(zip(read.top_ids[i], read.top[i], strict=True), 1)
            ),
        ]
        hover.append("<br>".join(lines))
    figure.data[0].hovertext = hover
    return shown(figure, show)
