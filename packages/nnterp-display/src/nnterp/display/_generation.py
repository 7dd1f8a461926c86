"""A generation, step by step: the token that was taken, and those that were most probable."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go

from nnterp.arguments import count
from nnterp.display._arrays import number
from nnterp.display._blocks import BlockMap, draw_blocks
from nnterp.display._cell_text import inks
from nnterp.display._grid import Cells
from nnterp.display._predicted import Predicted, predicted
from nnterp.display._scales import Ruler, Scale, check_scale
from nnterp.display._text import escape
from nnterp.display._theme import SEQUENTIAL, shown
from nnterp.token_text import TokenNames, shorten, width


def plot_generation(
    logits: Any,
    tokens: Any,
    tokenizer: Any = None,
    *,
    top_k: int = 5,
    scale: Scale = "linear",
    page: int = 1000,
    title: str | None = None,
    show: bool = False,
) -> go.Figure:
    """A column for each generated token: above, the token that was taken; below, the most probable ones of that step.

    Args:
        logits: `[steps, vocab]`, the logits (or log-probabilities) from which each token was taken: those of
            `model.generate(..., output_logits=True)`, or of one forward pass over prompt and generated text, at the
            positions before each generated token.
        tokens: `[steps]`, the ids of the generated tokens.
        tokenizer: Names the tokens.
        top_k: How many of the most probable tokens to show.
        scale: The scale of the colours: "linear", "log" or "logodds".
        page: The figure's width in pixels, at most. Steps that do not fit go into further blocks below.
        title: Plain text.
        show: Also show the figure, in a notebook or a browser.

    Returns:
        The figure, coloured by probability. Hovering says the probability of a token, and of the token that was taken
        its rank and the entropy of the step.

    Raises:
        ValueError: There is not one row for each token, an id is not in the vocabulary, or these are probabilities.

    Example:
        >>> import torch
        >>> from nnterp import display
        >>> figure = display.plot_generation(torch.eye(3) * 9, [0, 1, 1], top_k=2)
        >>> figure.data[0].hovertext[0][2]
        'step 2: ⟨id 1⟩<br>probability 1.2e-04, rank 2<br>entropy 0.0025 nats'
    """
    check_scale(scale)
    read = predicted(logits, tokens, count(top_k, "top_k"), "logits ([steps, vocab])")
    names = TokenNames(tokenizer)
    taken = names.many(read.ids)
    best = [names.many(ids) for ids in read.top_ids]
    texts = [taken, *(list(row) for row in zip(*best, strict=True))]
    shares = np.exp(np.vstack([read.own, read.top.T]))
    ruler = Ruler(shares, scale)
    size = Cells.for_text(len(texts), len(taken), max(width(text) for row in texts for text in row))
    drawn = BlockMap(
        z=ruler.places(shares),
        texts=[[shorten(text, size.columns) for text in row] for row in texts],
        hover=[_of_taken(read, taken), *(_of_rank(texts, shares, rank) for rank in range(1, len(texts)))],
        inks=inks(ruler.levels(shares), SEQUENTIAL),
        rows=["taken", *(str(rank) for rank in range(1, len(texts)))],
        columns=[str(step) for step in range(len(taken))],
        row_axis="rank",
        column_axis="step",
        scale={"colorscale": SEQUENTIAL, "zmin": ruler.low, "zmax": ruler.high},
        bar={"title": {"text": "probability"}, "thickness": 14, **ruler.ticks()},
        downward=True,
    )
    return shown(draw_blocks(drawn, size, count(page, "page"), "Generation" if title is None else title), show)


def _of_taken(read: Predicted, taken: list[str]) -> list[str]:
    return [
        f"step {i}: {escape(shorten(name, 40))}<br>probability {number(float(np.exp(read.own[i])))}, "
        f"rank {read.ranks[i]:,}<br>entropy {number(read.entropy[i])} nats"
        for i, name in enumerate(taken)
    ]


def _of_rank(texts: list[list[str]], shares: np.ndarray, rank: int) -> list[str]:
    return [
        f"step {i}, rank {rank}: {escape(shorten(name, 40))}<br>probability {number(shares[rank, i])}"
        for i, name in enumerate(texts[rank])
    ]
