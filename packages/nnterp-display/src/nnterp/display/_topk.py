"""The most probable tokens of each layer, one panel per prompt: `plot_topk_tokens` of nnterp 1.x."""

from __future__ import annotations

import math
from dataclasses import dataclass
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
from nnterp.indices import integer
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
        file: Also write the figure to this path: a page if the suffix is `.html`, else an image.
        save_html: If `file` is an image, also write a page beside it.
        height: Pixels of a panel, at least; with many layers a panel is higher, so that they can be read.
        width: Pixels of a panel.
        show: Show the figure, in a notebook or a browser.

    Returns:
        The figure.

    Raises:
        ValueError: `next_token_probs` does not hold probabilities, `k` is not between 1 and the size of the vocabulary,
            or `file` has the suffix of neither a page nor an image.
        ImageWriterMissing: `file` is an image, and no image writer is installed. The page has been written by then.
        TypeError: `height` or `width` is no number.

    Example:
        figure = display.plot_topk_tokens(logit_lens(model, prompts), model.tokenizer, show=False)
    """
    probs = as_array(next_token_probs, "next_token_probs ([prompts, layers, vocab])", 1, 2, 3)
    probs = probs.reshape((1,) * (3 - probs.ndim) + probs.shape)
    check_probabilities(probs, "next_token_probs")
    prompts, layers, vocab = probs.shape
    for name, given in (("width", width), ("height", height)):
        if isinstance(given, bool) or not isinstance(given, (int, float)):
            raise TypeError(f"{name} is a number of pixels, not {given!r:.80}.")
        if not 50 <= given < 1e5:
            raise ValueError(f"{name} is a number of pixels, at least 50, not {given}.")
    k = integer(k, "k")
    if not 1 <= k <= vocab:
        raise ValueError(f"k goes from 1 to {vocab}, the size of the vocabulary, not {k}.")
    ids = np.argsort(-probs, axis=-1, kind="stable")[..., :k]
    best = np.take_along_axis(probs, ids, -1)
    panels = _lay_panels(prompts, layers, width, height)
    figure = make_subplots(
        rows=panels.down,
        cols=panels.across,
        horizontal_spacing=_GAP_X / panels.inner[0],
        vertical_spacing=_GAP_Y / panels.inner[1],
    )
    names = TokenNames(tokenizer)
    for prompt in range(prompts):
        _add_panel(figure, panels, prompt, _Top(ids[prompt], best[prompt], names, use_token_ids))
    _set_layout(figure, panels, title or f"Top {k} tokens of each layer")
    if file is not None:
        path = Path(file)
        if save_html and path.suffix != ".html":
            save(figure, path.with_suffix(".html"))
        save(figure, path, scale=3)
    return shown(figure, show)


@dataclass(frozen=True)
class _Panels:
    """How the panels are laid out, one for each prompt.

    Attributes:
        across, down: Panels side by side, and below each other.
        wide, tall: Pixels of one panel's plot area.
    """

    across: int
    down: int
    wide: int
    tall: int

    @property
    def inner(self) -> tuple[int, int]:
        """Pixels of all plot areas with the gaps between them, across and down."""
        return (
            self.across * self.wide + (self.across - 1) * _GAP_X,
            self.down * self.tall + (self.down - 1) * _GAP_Y,
        )

    def place(self, prompt: int) -> dict[str, int]:
        """The subplot of a prompt, as plotly counts them."""
        return {"row": prompt // self.across + 1, "col": prompt % self.across + 1}


def _lay_panels(prompts: int, layers: int, width: int, height: int) -> _Panels:
    across = min(_PANELS_ACROSS, prompts)
    return _Panels(
        across=across,
        down=math.ceil(prompts / across),
        wide=max(width - _LEFT - 20, 120),
        tall=max(height - _TOP - _BOTTOM, layers * _ROW, 80),
    )


@dataclass(frozen=True)
class _Top:
    """The top tokens of one prompt: ids and probabilities `[layers, k]`, their names, and whether ids are shown."""

    ids: np.ndarray
    probabilities: np.ndarray
    names: TokenNames
    as_ids: bool

    def text(self, token: int) -> str:
        """What a cell shows."""
        return str(token) if self.as_ids else self.names(token)

    def hover(self, i: int, j: int) -> str:
        token = self.ids[i, j]
        return (
            f"layer {i}, rank {j + 1}<br>id {token}  {escape(self.names(token))}"
            f"<br>probability {number(self.probabilities[i, j])}"
        )


def _add_panel(figure: go.Figure, panels: _Panels, prompt: int, top: _Top) -> None:
    """Draw one prompt's heat map with its texts and axes."""
    layers, k = top.ids.shape
    place = panels.place(prompt)
    figure.add_trace(
        go.Heatmap(
            z=top.probabilities,
            x=list(range(k)),
            y=list(range(layers)),
            hovertext=[[top.hover(i, j) for j in range(k)] for i in range(layers)],
            hovertemplate="%{hovertext}<extra></extra>",
            coloraxis="coloraxis",
            xgap=1,
            ygap=1,
        ),
        **place,
    )
    columns = max(int((panels.wide / k - 6) / (11 * MONO_WIDTH)), 2)
    texts = [[shorten(top.text(token), columns) for token in row] for row in top.ids.tolist()]
    figure.add_trace(cell_text(texts, inks(top.probabilities, SEQUENTIAL), 11), **place)
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
    ticks = number_ticks(range(layers), panels.tall // layers)
    figure.update_yaxes(**ticks, range=[-0.5, layers - 0.5], title_text="layer", **place)


def _set_layout(figure: go.Figure, panels: _Panels, title: str) -> None:
    """Set theme, title, size and the colour bar that all panels share."""
    inner = panels.inner
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
