"""`plot_topk_tokens`: the most probable tokens of each layer, one panel per prompt (1.x)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from nnterp.display._arrays import as_array, check_probabilities, number
from nnterp.display._cell_text import cell_text, inks
from nnterp.display._grid import number_ticks
from nnterp.display._save import save
from nnterp.display._text import escape, escape_lines
from nnterp.display._theme import MONO_WIDTH, SEQUENTIAL, TEMPLATES, current_theme, shown
from nnterp.token_text import TokenNames, shorten

_PANELS_ACROSS = 3
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 110, 72, 64
_GAP_X, _GAP_Y = 72, 84
_ROW = 18


def plot_topk_tokens(
    next_token_probs: Any,
    tokenizer: Any,
    k: int = 4,
    title: str | None = None,
    use_token_ids: bool = False,
    file: str | Path | None = None,
    save_html: bool = True,
    height: int = 300,
    width: int = 400,
    show: bool = True,
) -> go.Figure:
    """The `k` most probable next tokens of every layer, as a heat map of their probabilities; a panel per prompt.

    Args:
        next_token_probs: `[prompts, layers, vocab]`, `[layers, vocab]` or `[vocab]`, as `logit_lens` returns.
        tokenizer: Names the tokens.
        k: How many tokens.
        title: Plain text.
        use_token_ids: Show ids instead of tokens.
        file: Also write the figure: an image if the suffix is one of an image, a page if it is `.html`.
        save_html: With an image, also write the page beside it.
        height: Pixels of a panel at least; a panel with many layers grows so that they can be read.
        width: Pixels of a panel.
        show: Show the figure, in a notebook or a browser. False leaves that to the caller.

    Returns:
        The figure.

    Raises:
        ValueError: These are no probabilities over the vocabulary, or `k` is not between 1 and its size.
        ImageWriterMissing: An image was asked for, and there is nothing to write it with; a page that was asked for as
            well has been written.
    """
    probs = as_array(next_token_probs, "next_token_probs ([prompts, layers, vocab])", 1, 2, 3)
    probs = probs.reshape((1,) * (3 - probs.ndim) + probs.shape)
    check_probabilities(probs, "next_token_probs")
    prompts, layers, vocab = probs.shape
    if not 1 <= k <= vocab:
        raise ValueError(f"k goes from 1 to {vocab}, the size of the vocabulary, not {k}.")
    ids = np.argsort(-probs, axis=-1, kind="stable")[..., :k]
    best = np.take_along_axis(probs, ids, -1)
    names = TokenNames(tokenizer)

    across = min(_PANELS_ACROSS, prompts)
    down = math.ceil(prompts / across)
    tall = max(height - _TOP - _BOTTOM, layers * _ROW, 80)
    wide = max(width - _LEFT - 20, 120)
    inner = (across * wide + (across - 1) * _GAP_X, down * tall + (down - 1) * _GAP_Y)
    figure = make_subplots(
        rows=down, cols=across, horizontal_spacing=_GAP_X / inner[0], vertical_spacing=_GAP_Y / inner[1]
    )
    columns = max(int((wide / k - 6) / (11 * MONO_WIDTH)), 2)
    for prompt in range(prompts):
        texts = [[str(token) if use_token_ids else names(token) for token in row] for row in ids[prompt].tolist()]
        figure.add_trace(
            go.Heatmap(
                z=best[prompt],
                x=list(range(k)),
                y=list(range(layers)),
                hovertext=[
                    [
                        f"layer {i}, rank {j + 1}<br>id {ids[prompt, i, j]}  {escape(names(ids[prompt, i, j]))}"
                        f"<br>probability {number(best[prompt, i, j])}"
                        for j in range(k)
                    ]
                    for i in range(layers)
                ],
                hovertemplate="%{hovertext}<extra></extra>",
                coloraxis="coloraxis",
                xgap=1,
                ygap=1,
            ),
            row=prompt // across + 1,
            col=prompt % across + 1,
        )
        figure.add_trace(
            cell_text([[shorten(text, columns) for text in row] for row in texts], inks(best[prompt], SEQUENTIAL), 11),
            row=prompt // across + 1,
            col=prompt % across + 1,
        )
        figure.update_xaxes(
            title_text="rank (1 = most probable)",
            tickmode="array",
            tickvals=list(range(k)),
            range=[-0.5, k - 0.5],
            ticktext=[str(i + 1) for i in range(k)],
            showgrid=False,
            zeroline=False,
            row=prompt // across + 1,
            col=prompt % across + 1,
        )
        figure.update_yaxes(
            **number_ticks(range(layers), tall // layers),
            range=[-0.5, layers - 0.5],
            title_text="layer",
            row=prompt // across + 1,
            col=prompt % across + 1,
        )
    figure.update_layout(
        template=TEMPLATES[current_theme()],
        title_text=escape_lines(title or f"Top {k} tokens of each layer"),
        coloraxis={
            "colorscale": SEQUENTIAL,
            "cmin": 0,
            "cmax": 1,
            "colorbar": {
                "title": {"text": "probability"},
                "thickness": 14,
                "lenmode": "pixels",
                "len": min(inner[1] + 20, 420),
                "y": 1,
                "yanchor": "top",
                "ypad": 10,
            },
        },
        width=inner[0] + _LEFT + _RIGHT,
        height=inner[1] + _TOP + _BOTTOM,
        margin={"l": _LEFT, "r": _RIGHT, "t": _TOP, "b": _BOTTOM},
        showlegend=False,
    )
    if file is not None:
        path = Path(file)
        if save_html and path.suffix != ".html":
            save(figure, path.with_suffix(".html"))
        save(figure, path, scale=3)
    return shown(figure, show)
