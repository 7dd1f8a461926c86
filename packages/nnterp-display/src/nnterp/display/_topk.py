"""`plot_topk_tokens`: the most probable tokens of each layer, one panel per prompt (1.x)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from nnterp.display._arrays import number, top_tokens
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
        file: Also write the figure to this path: an image or an `.html` page, by its suffix (see `save`).
        save_html: If `file` is an image, also write the page next to it.
        height: Least height of a panel in pixels; panels with many layers are higher, so that each row can be read.
        width: Pixels of a panel.
        show: Show the figure, in a notebook or a browser. False leaves that to the caller.

    Returns:
        The figure.

    Raises:
        ValueError: These are no probabilities over the vocabulary, or `k` is not between 1 and its size.
        ImageWriterMissing: `file` is an image, and plotly has nothing to write it with. With `save_html`, the page has
            been written by then.
    """
    best, ids = top_tokens(next_token_probs, k)
    prompts, layers, _ = ids.shape
    names = TokenNames(tokenizer)
    panels = _Panels(prompts, max(width - _LEFT - 20, 120), max(height - _TOP - _BOTTOM, layers * _ROW, 80))
    figure = make_subplots(
        rows=panels.down,
        cols=panels.across,
        horizontal_spacing=_GAP_X / panels.inner[0],
        vertical_spacing=_GAP_Y / panels.inner[1],
    )
    for prompt in range(prompts):
        hover = _hover(best[prompt], ids[prompt], names)
        texts = [[str(token) if use_token_ids else names(token) for token in row] for row in ids[prompt].tolist()]
        row, column = divmod(prompt, panels.across)
        _add_panel(figure, panels, best[prompt], texts, hover, row=row + 1, col=column + 1)
    _lay_out(figure, panels, title or f"Top {k} tokens of each layer")
    if file is not None:
        path = Path(file)
        if save_html and path.suffix != ".html":
            save(figure, path.with_suffix(".html"))
        save(figure, path, scale=3)
    return shown(figure, show)


@dataclass(frozen=True)
class _Panels:
    """Panels of equal size, in rows of up to three.

    Attributes:
        count: How many panels.
        wide, tall: Pixels of a panel.
    """

    count: int
    wide: int
    tall: int

    @property
    def across(self) -> int:
        """Panels in a row."""
        return min(_PANELS_ACROSS, self.count)

    @property
    def down(self) -> int:
        """Rows of panels."""
        return math.ceil(self.count / self.across)

    @property
    def inner(self) -> tuple[int, int]:
        """Pixels of all panels with the gaps between them."""
        return (
            self.across * self.wide + (self.across - 1) * _GAP_X,
            self.down * self.tall + (self.down - 1) * _GAP_Y,
        )


def _hover(best: np.ndarray, ids: np.ndarray, names: TokenNames) -> list[list[str]]:
    return [
        [
            f"layer {i}, rank {j + 1}<br>id {token}  {escape(names(token))}<br>probability {number(value)}"
            for j, (token, value) in enumerate(zip(*row, strict=True))
        ]
        for i, row in enumerate(zip(ids, best, strict=True))
    ]


def _add_panel(
    figure: go.Figure,
    panels: _Panels,
    best: np.ndarray,
    texts: list[list[str]],
    hover: list[list[str]],
    **place: int,
) -> None:
    """Draw the top probabilities of one prompt, `[layers, k]`, at a row and column of the figure."""
    layers, k = best.shape
    characters = max(int((panels.wide / k - 6) / (11 * MONO_WIDTH)), 2)
    figure.add_trace(
        go.Heatmap(
            z=best,
            x=list(range(k)),
            y=list(range(layers)),
            hovertext=hover,
            hovertemplate="%{hovertext}<extra></extra>",
            coloraxis="coloraxis",
            xgap=1,
            ygap=1,
        ),
        **place,
    )
    shortened = [[shorten(text, characters) for text in row] for row in texts]
    figure.add_trace(cell_text(shortened, inks(best, SEQUENTIAL), 11), **place)
    figure.update_xaxes(
        title_text="rank (1 = most probable)",
        tickmode="array",
        tickvals=list(range(k)),
        range=[-0.5, k - 0.5],
        ticktext=[str(i + 1) for i in range(k)],
        showgrid=False,
        zeroline=False,
        **place,
    )
    figure.update_yaxes(
        **number_ticks(range(layers), panels.tall // layers), range=[-0.5, layers - 0.5], title_text="layer", **place
    )


def _lay_out(figure: go.Figure, panels: _Panels, title: str) -> None:
    """Theme, title, the common colour bar and the size of the figure."""
    wide, tall = panels.inner
    figure.update_layout(
        template=TEMPLATES[current_theme()],
        title_text=escape_lines(title),
        coloraxis={
            "colorscale": SEQUENTIAL,
            "cmin": 0,
            "cmax": 1,
            "colorbar": {
                "title": {"text": "probability"},
                "thickness": 14,
                "lenmode": "pixels",
                "len": min(tall + 20, 420),
                "y": 1,
                "yanchor": "top",
                "ypad": 10,
            },
        },
        width=wide + _LEFT + _RIGHT,
        height=tall + _TOP + _BOTTOM,
        margin={"l": _LEFT, "r": _RIGHT, "t": _TOP, "b": _BOTTOM},
        showlegend=False,
    )
