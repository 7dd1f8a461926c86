"""The logit-lens grid: the most probable next token at each layer and position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import plotly.graph_objects as go

from nnterp.display._arrays import check_same, number
from nnterp.display._cell_text import cell_text, inks
from nnterp.display._grid import Cells, fit, label_pixels, number_ticks, token_ticks
from nnterp.display._lens_cells import Colour, LensCells, cells_of_probabilities
from nnterp.display._results.labelled import is_numbers
from nnterp.display._results.lens import lens_cells
from nnterp.display._text import as_names, escape
from nnterp.display._theme import SEQUENTIAL, new_figure, shown
from nnterp.indices import integer
from nnterp.token_text import shorten, width


def plot_lens(
    lens: Any,
    tokenizer: Any = None,
    *,
    tokens: Sequence[Any] | None = None,
    layers: Sequence[Any] | None = None,
    prompt: int = 0,
    color: Colour = "probability",
    target: int | Sequence[int] | None = None,
    top_k: int = 5,
    title: str | None = None,
    show: bool = False,
) -> go.Figure:
    """Layer × position: the most probable next token in each cell, the `top_k` on hover (nostalgebraist 2020).

    Args:
        lens: Probabilities of the next token, `[layers, positions, vocab]` (`[layers, vocab]` for one position), or the
            result of a lens of `nnterp.interventions`.
        tokenizer: Names the tokens. Without one, a result's tokens are named by the result, and others by their ids.
        tokens: The input token of each column, as ids or texts; their positions if None.
        layers: Labels of the rows; 0, 1, … if None.
        prompt: Which prompt, of a result with several.
        color: What colours a cell: the "probability" of its top token, the "rank" of the token that is on top in the
            last layer, or the "entropy" of the distribution in nats. Bright means certain in all three.
        target: A token id, or one for each position: "probability" and "rank" are then those of this token. For a
            result, one of its targets; "rank" takes the first target if none is given.
        top_k: How many tokens are shown on hover.
        title: Plain text.
        show: Also show the figure, in a notebook or a browser.

    Returns:
        The figure, large enough to read each token.

    Raises:
        ValueError: `lens` does not hold probabilities, labels do not fit their axis, a result lacks what `color` or
            `target` needs, or there is no such `color`.
        IndexError: There is no such prompt.
    """
    if color not in get_args(Colour):
        raise ValueError(f"color must be 'probability', 'rank' or 'entropy', not {color!r}.")
    top_k = integer(top_k, "top_k")
    if is_numbers(lens):
        cells = cells_of_probabilities(
            lens, tokenizer, tokens=tokens, layers=layers, kind=color, target=target, top_k=top_k
        )
        return shown(_draw(cells, title), show)
    if target is not None and isinstance(target, (list, tuple)):
        raise ValueError("Of a result, target is one token id: each prompt has its own list of targets.")
    one = None if target is None else integer(target, "target")
    cells, own_title = lens_cells(lens, tokenizer, prompt=prompt, kind=color, top_k=top_k, target=one, layers=layers)
    if tokens is not None:
        check_same("tokens", len(tokens), len(cells.inputs), "the column axis of the result")
        cells = replace(cells, inputs=as_names(tokens, tokenizer))
    return shown(_draw(cells, own_title if title is None else title), show)


def _draw(cells: LensCells, title: str | None) -> go.Figure:
    rows, columns = len(cells.layers), len(cells.positions)
    size = Cells.for_text(rows, columns, max(width(cell[0]) for row in cells.tokens for cell in row))
    scale, bar = _colour_scale(cells)
    z = np.log10(cells.colour) if cells.kind == "rank" else cells.colour
    figure = new_figure(title)
    figure.add_trace(
        go.Heatmap(
            z=z,
            hovertext=[[_hover(cells, i, j) for j in range(columns)] for i in range(rows)],
            hovertemplate="%{hovertext}<extra></extra>",
            xgap=1,
            ygap=1,
            **scale,
            colorbar=bar,
        )
    )
    text = [[shorten(cell[0], size.columns) for cell in row] for row in cells.tokens]
    ink = inks(z / scale["zmax"], SEQUENTIAL, reverse=scale.get("reversescale", False))
    figure.add_trace(cell_text(text, ink, size.font))
    labels = [name or str(position) for name, position in zip(cells.inputs, cells.positions, strict=True)]
    ticks = token_ticks(labels, size.width)
    unit = cells.column_axis if any(cells.inputs) else cells.column_axis.split(" ")[0]
    figure.update_xaxes(**ticks, title_text=unit, range=[-0.5, columns - 0.5])
    figure.update_yaxes(**number_ticks(cells.layers, size.height), title_text="layer", range=[-0.5, rows - 0.5])
    below = label_pixels(labels) if ticks["tickangle"] else 24
    return fit(
        figure,
        width=columns * size.width,
        height=rows * size.height,
        left=44 + label_pixels(cells.layers),
        bottom=below + 44,
    )


def _hover(cells: LensCells, i: int, j: int) -> str:
    """The hover text of one cell: where it is, its top tokens with probabilities, and the value that colours it."""
    where = f"layer {cells.layers[i]}, {cells.column_axis.split(' ')[0]} {cells.positions[j]}"
    lines = [escape(f"{where}  {shorten(cells.inputs[j], 60)}".rstrip())]
    longest = max(width(name) for name in cells.tokens[i][j])
    for rank, (name, probability) in enumerate(zip(cells.tokens[i][j], cells.probabilities[i, j], strict=True), 1):
        padding = " " * (min(longest, 40) - width(shorten(name, 40)))
        lines.append(f"{rank}. {escape(shorten(name, 40))}{padding}  {number(probability)}")
    value = cells.colour[i, j]
    if cells.kind == "rank" and cells.targets is not None:
        lines.append(f"rank {value:.0f}: {escape(cells.targets[j])}")
    elif cells.kind == "entropy":
        lines.append(f"entropy {value:.3f} nats")
    elif cells.targets is not None:
        lines.append(f"{number(value)}: {escape(cells.targets[j])}")
    return "<br>".join(lines)


def _colour_scale(cells: LensCells) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings of the heat map's colours and of its colour bar; ranks are drawn on a logarithmic scale."""
    bar = {"title": {"text": cells.colour_name}, "thickness": 14}
    if cells.kind == "probability":
        return {"colorscale": SEQUENTIAL, "zmin": 0, "zmax": 1}, bar
    if cells.kind == "entropy":
        top = float(np.nanmax(cells.colour)) or 1.0
        return {"colorscale": SEQUENTIAL, "reversescale": True, "zmin": 0, "zmax": top}, bar
    decades = max(int(np.ceil(np.log10(max(float(np.nanmax(cells.colour)), 2.0)))), 1)
    ticks = {"tickvals": list(range(decades + 1)), "ticktext": [f"{10**i:,}" for i in range(decades + 1)]}
    return {"colorscale": SEQUENTIAL, "reversescale": True, "zmin": 0, "zmax": decades}, {**bar, **ticks}
