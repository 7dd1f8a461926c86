"""What a patchscope reads out: a table of layers by sources."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from nnterp.display import _adapt
from nnterp.display._arrays import as_array, check_probabilities
from nnterp.display._cell_text import inks
from nnterp.display._grid import check_same, table_row
from nnterp.display._text import escape
from nnterp.display._theme import MONO, MONO_WIDTH, SEQUENTIAL, new_figure, shown
from nnterp.token_text import TokenNames, shorten, visible, width

_FONT = 12
_NAME = 24
_SHORT = 24


def plot_patchscope(
    readings: Any,
    tokenizer: Any = None,
    *,
    sources: Sequence[str] | None = None,
    layers: Sequence[Any] | None = None,
    top_k: int | None = None,
    title: str | None = None,
    show: bool = False,
) -> go.Figure:
    """A table of layers by sources: what the target prompt said next (Ghandeharioun et al. 2024).

    Args:
        readings: Probabilities `[sources, layers, vocab]` (`[layers, vocab]` for one source) as `patchscope_lens`
            returns, texts by source and layer (`readings[source][layer]`) as generated, or a result object.
        tokenizer: Names the tokens; without one, ids are shown.
        sources: Labels of the columns; 0, 1, … if None.
        layers: Labels of the rows; 0, 1, … if None.
        top_k: Tokens in a cell, with their probabilities; 3 where there are up to 24 layers, 1 where there are more.
        title: Plain text.
        show: Also show the figure, in a notebook or a browser.

    Returns:
        The figure; cells are shaded by the probability of their first token.

    Raises:
        ValueError: `readings` are no probabilities, or labels do not fit their axis.
    """
    if not _adapt.is_numbers(readings):
        texts, best, own = _adapt.readings(readings, tokenizer, top_k)
        cells, shades = lines_of(texts, best), best[..., 0]
        title = own["title"] if title is None else title
        sources = own["sources"] if sources is None else sources
        layers = own["layers"] if layers is None else layers
    elif _is_texts(readings):
        cells = [
            [textwrap.wrap(visible(text).replace("·", " "), 36) or ["⟨empty⟩"] for text in column]
            for column in readings
        ]
        shades = None
    else:
        cells, shades = _top(readings, tokenizer, top_k)
    columns, rows = len(cells), len(cells[0])
    if any(len(column) != rows for column in cells):
        raise ValueError(f"Each source needs one reading per layer; they have {[len(column) for column in cells]}.")
    headings = [str(i) for i in range(columns)] if sources is None else [str(source) for source in sources]
    check_same("sources", len(headings), columns, "the source axis of readings")
    row_names = [str(i) for i in range(rows)] if layers is None else [str(layer) for layer in layers]
    check_same("layers", len(row_names), rows, "the layer axis of readings")
    figure = _draw(cells, shades, headings, row_names, title)
    return shown(figure, show)


def _is_texts(readings: Any) -> bool:
    return (
        isinstance(readings, (list, tuple))
        and bool(readings)
        and all(
            isinstance(column, (list, tuple)) and column and all(isinstance(text, str) for text in column)
            for column in readings
        )
    )


def shown_tokens(top_k: int | None, layers: int) -> int:
    """How many tokens a cell shows."""
    return (3 if layers <= _SHORT else 1) if top_k is None else max(top_k, 1)


def _top(readings: Any, tokenizer: Any, top_k: int | None) -> tuple[list[list[list[str]]], np.ndarray]:
    probs = as_array(readings, "readings ([sources, layers, vocab])", 2, 3)
    probs = probs[None] if probs.ndim == 2 else probs
    check_probabilities(probs, "readings")
    order = np.argsort(-probs, axis=-1, kind="stable")[..., : shown_tokens(top_k, probs.shape[1])]
    best = np.take_along_axis(probs, order, -1)
    names = TokenNames(tokenizer)
    texts = [[names.many(ids) for ids in column] for column in order]
    return lines_of(texts, best), best[..., 0]


def lines_of(texts: Sequence[Sequence[Sequence[str]]], probabilities: np.ndarray) -> list[list[list[str]]]:
    """The lines of each cell: a token and its probability, in aligned columns."""
    longest = max(width(shorten(text, _NAME)) for column in texts for cell in column for text in cell)
    return [
        [
            [
                f"{shorten(text, _NAME)}{' ' * (longest - width(shorten(text, _NAME)))} {value:.2f}"
                for text, value in zip(cell, values, strict=True)
            ]
            for cell, values in zip(column, numbers, strict=True)
        ]
        for column, numbers in zip(texts, probabilities, strict=True)
    ]


def _draw(
    cells: list[list[list[str]]],
    shades: np.ndarray | None,
    headings: list[str],
    row_names: list[str],
    title: str | None,
) -> go.Figure:
    rows = len(row_names)
    pixels = []
    wrapped = []
    for heading, column in zip(headings, cells, strict=True):
        longest = max(width(line) for cell in column for line in cell)
        columns = min(max(longest, min(width(heading), 28), 8), 44)
        wrapped.append(textwrap.wrap(visible(heading).replace("·", " "), columns) or [""])
        pixels.append(round((columns + 2) * _FONT * MONO_WIDTH) + 12)
    first = max(round(max(width(name) for name in [*row_names, "layer"]) * 8) + 24, 58)
    head_lines = max(len(lines) for lines in wrapped)
    tall = [max(len(column[i]) for column in cells) for i in range(rows)]
    row_height = table_row(min(tall), _FONT)
    fills, ink = _shading(shades, len(cells), rows)
    body = [[escape(name) for name in row_names], *([_cell(cell) for cell in column] for column in cells)]
    table = go.Table(
        columnwidth=[first, *pixels],
        header={
            "values": ["layer", *("<br>".join(map(escape, lines)) for lines in wrapped)],
            "align": ["right", *["left"] * len(cells)],
            "height": table_row(head_lines, _FONT),
            "font": {"size": _FONT},
        },
        cells={
            "values": body,
            "align": ["right", *["left"] * len(cells)],
            "height": row_height,
            "font": {"family": MONO, "size": _FONT, **({"color": ink} if ink else {})},
            **({"fill": {"color": fills}} if fills else {}),
        },
    )
    figure = new_figure(title)
    figure.add_trace(table)
    top = 64 if title else 16
    figure.update_layout(
        width=first + sum(pixels) + 32,
        height=top + table_row(head_lines, _FONT) + sum(table_row(lines, _FONT) for lines in tall) + 28,
        margin={"l": 16, "r": 16, "t": top, "b": 16},
    )
    return figure


def _cell(lines: list[str]) -> str:
    return "<br>".join(escape(line) for line in lines)


def _shading(shades: np.ndarray | None, columns: int, rows: int) -> tuple[list | None, list | None]:
    """Fill and ink of each cell, the labels' column first; none where there is nothing to shade by."""
    if shades is None:
        return None, None
    fills: list[list[str]] = [["rgba(127,127,127,0.12)"] * rows]
    text: list[list[str]] = [["#808890"] * rows]
    for column in range(columns):
        colours = sample_colorscale(SEQUENTIAL, [min(max(float(np.nan_to_num(v)), 0.0), 1.0) for v in shades[column]])
        fills.append(list(colours))
        text.append(inks(shades[column], SEQUENTIAL).tolist())
    return fills, text
