"""The logit-lens grid: the next token that each layer predicts at each position."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from nnterp.display._arrays import number
from nnterp.display._cell_text import cell_text, inks
from nnterp.display._grid import Cells, fit, label_pixels, number_ticks, token_ticks
from nnterp.display._lens_cells import Colour, LensCells, cells_of_probabilities, cells_of_result
from nnterp.display._results import is_numbers
from nnterp.display._text import escape
from nnterp.display._theme import SEQUENTIAL, new_figure, shown
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
            result object of a lens of `nnterp.interventions`.
        tokenizer: Names the tokens. Without one, a result shows the texts it carries, and probabilities show ids.
        tokens: The input tokens of the columns, as ids or texts; their positions if None.
        layers: Labels of the rows; 0, 1, … if None.
        prompt: Which prompt of a result with several.
        color: "probability" of the top token, "rank" of the token that the last layer predicts, or "entropy" of the
            distribution in nats. Bright cells are the most certain ones in all three.
        target: A token id, or one per position: "probability" and "rank" are those of this token instead. Of a result,
            one of its targets; "rank" takes the first if none is named.
        top_k: How many tokens hovering shows.
        title: Plain text.
        show: Also show the figure, in a notebook or a browser.

    Returns:
        The figure, sized so that each token can be read.

    Raises:
        ValueError: `lens` are no probabilities, labels do not fit their axis, or the result lacks what `color` needs.
        IndexError: The result has no prompt `prompt`.
        TypeError: `lens` is neither numbers nor a result.
    """
    if not is_numbers(lens):
        if target is not None and not hasattr(target, "__index__"):
            raise ValueError("Of a result, target is one token id: each prompt has its own list of targets.")
        cells, own_title = cells_of_result(
            lens,
            tokenizer,
            prompt=prompt,
            colour=color,
            top_k=top_k,
            target=target,  # type: ignore[arg-type]
            layers=layers,
        )
        title = own_title if title is None else title
    else:
        cells = cells_of_probabilities(lens, tokenizer, tokens, layers, color, target, top_k)
    return shown(_draw(cells, title), show)


def _draw(cells: LensCells, title: str | None) -> go.Figure:
    """The heat map with the top tokens written in its cells."""
    rows, columns = len(cells.layers), len(cells.positions)
    size = Cells.for_text(rows, columns, max(width(cell[0]) for row in cells.tokens for cell in row))
    hover = [[_hover(cells, i, j) for j in range(columns)] for i in range(rows)]
    text = [[shorten(cell[0], size.columns) for cell in row] for row in cells.tokens]
    scale, bar = _colour_scale(cells)
    z = np.log10(cells.colour) if cells.kind == "rank" else cells.colour
    figure = new_figure(title)
    figure.add_trace(
        go.Heatmap(
            z=z,
            hovertext=hover,
            hovertemplate="%{hovertext}<extra></extra>",
            xgap=1,
            ygap=1,
            **scale,
            colorbar=bar,
        )
    )
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
    """Settings of the heat map's colour scale, and of its colour bar."""
    bar: dict[str, Any] = {"title": {"text": cells.colour_name}, "thickness": 14}
    if cells.kind == "probability":
        return {"colorscale": SEQUENTIAL, "zmin": 0, "zmax": 1}, bar
    if cells.kind == "entropy":
        top = float(np.nanmax(cells.colour)) or 1.0
        return {"colorscale": SEQUENTIAL, "reversescale": True, "zmin": 0, "zmax": top}, bar
    decades = max(int(np.ceil(np.log10(max(float(np.nanmax(cells.colour)), 2.0)))), 1)
    ticks = {"tickvals": list(range(decades + 1)), "ticktext": [f"{10**i:,}" for i in range(decades + 1)]}
    return {"colorscale": SEQUENTIAL, "reversescale": True, "zmin": 0, "zmax": decades}, {**bar, **ticks}
