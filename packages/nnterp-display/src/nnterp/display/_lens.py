"""The logit-lens grid: the most probable next token at each layer and position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import plotly.graph_objects as go

from nnterp.arguments import count
from nnterp.display._arrays import check_same, number
from nnterp.display._blocks import BlockMap, draw_blocks
from nnterp.display._cell_text import inks
from nnterp.display._grid import Cells
from nnterp.display._lens_cells import Colour, LensCells, cells_of_probabilities
from nnterp.display._results.labelled import is_numbers
from nnterp.display._results.lens import lens_cells
from nnterp.display._scales import Ruler, Scale, check_scale
from nnterp.display._text import as_names, escape
from nnterp.display._theme import SEQUENTIAL, shown
from nnterp.indices import Indices, integer, integers
from nnterp.token_text import shorten, width

_ON_HOVER = 5


def plot_lens(
    lens: Any,
    tokenizer: Any = None,
    *,
    tokens: Sequence[Any] | None = None,
    layers: Sequence[Any] | None = None,
    prompt: int = 0,
    color: Colour = "probability",
    scale: Scale = "linear",
    target: int | Sequence[int] | None = None,
    top_k: int | None = None,
    every: int = 1,
    positions: Indices = None,
    page: int = 1000,
    title: str | None = None,
    show: bool = False,
) -> go.Figure:
    """Layer × position: the most probable next token in each cell, more of them on hover (nostalgebraist 2020).

    Args:
        lens: Probabilities of the next token, `[layers, positions, vocab]` (`[layers, vocab]` for one position), or the
            result of a lens of `nnterp.interventions`.
        tokenizer: Names the tokens. Without one, a result's tokens are named by the result, and others by their ids.
        tokens: The input token of each column, as ids or texts; their positions if None.
        layers: Labels of the rows; 0, 1, … if None.
        prompt: Which prompt, of a result with several.
        color: What colours a cell: the "probability" of its top token; the "rank" of the token that is on top in the
            last layer; the "entropy" of the distribution; or "kl", how far the distribution is from that of the last
            layer, KL(last ‖ layer), both in nats. Bright means certain, or close to the last layer, in all four. The
            last layer is the model's own in a result, drawn or not, and the last row of an array of probabilities.
        scale: For "probability": "linear", "log", or "logodds" (log10 of p / (1 − p)), to see probabilities that are
            near 0 in most layers. The bar still says probabilities.
        target: A token id, or one for each position: "probability" and "rank" are then those of this token. For a
            result, one of its targets.
        top_k: How many tokens to write in each cell and to list on hover. If None, one is in the cell, and hovering
            lists 5, or all that a result holds.
        every: Draw only every so many-th layer, counted back from the last.
        positions: Which columns to draw, as indices into those that `lens` has; all if None.
        page: The figure's width in pixels, at most. Columns that do not fit go into further blocks below.
        title: Plain text.
        show: Also show the figure, in a notebook or a browser.

    Returns:
        The figure, large enough to read each token.

    Raises:
        ValueError: `lens` does not hold probabilities, labels do not fit their axis, a result lacks what `color`,
            `target` or `top_k` needs, or there is no such `color` or `scale`.
        IndexError: There is no such prompt or position.

    Example:
        figure = display.plot_lens(logit_lens_table(model, prompts[0]))
    """
    if color not in get_args(Colour):
        raise ValueError(f"color must be 'probability', 'rank', 'entropy' or 'kl', not {color!r}.")
    check_scale(scale)
    if scale != "linear" and color != "probability":
        raise ValueError(f"scale={scale!r} is a scale of probabilities, and color={color!r} shows none.")
    every, page = count(every, "every"), count(page, "page")
    listed = _ON_HOVER if top_k is None else count(top_k, "top_k")
    own_title = None
    if is_numbers(lens):
        cells = cells_of_probabilities(
            lens, tokenizer, tokens=tokens, layers=layers, kind=color, target=target, top_k=listed
        )
    else:
        if target is not None and isinstance(target, (list, tuple)):
            raise ValueError("Of a result, target is one token id: each prompt has its own list of targets.")
        one = None if target is None else integer(target, "target")
        cells, own_title = lens_cells(
            lens, tokenizer, prompt=prompt, kind=color, top_k=top_k, target=one, layers=layers
        )
        if tokens is not None:
            check_same("tokens", len(tokens), len(cells.inputs), "the column axis of the result")
            cells = replace(cells, inputs=as_names(tokens, tokenizer))
    rows = range((len(cells.layers) - 1) % every, len(cells.layers), every)
    cells = cells.take(rows, _chosen(positions, len(cells.positions)))
    drawn = _draw(cells, 1 if top_k is None else listed, scale, page, own_title if title is None else title)
    return shown(drawn, show)


def _chosen(positions: Indices, columns: int) -> list[int]:
    """The columns to draw, negative indices counted from the end."""
    asked = integers(positions, "positions")
    if asked is None or isinstance(asked, slice):
        given = list(range(columns)[asked or slice(None)])
    else:
        given = [asked] if isinstance(asked, int) else asked
    for position in given:
        if not -columns <= position < columns:
            raise IndexError(f"There is no column {position}: this lens has {columns}.")
    if not given:
        raise ValueError(f"positions={positions!r} leaves none of the {columns} columns to draw.")
    return [position % columns for position in given]


def _draw(cells: LensCells, lines: int, scale: Scale, page: int, title: str | None) -> go.Figure:
    rows, columns = len(cells.layers), len(cells.positions)
    longest = max(width(name) for row in cells.tokens for cell in row for name in cell[:lines])
    size = Cells.for_text(rows, columns, longest, lines)
    colours, bar, levels, z = _colours(cells, scale)
    text = [["\n".join(shorten(name, size.columns) for name in cell[:lines]) for cell in row] for row in cells.tokens]
    labels = [name or str(position) for name, position in zip(cells.inputs, cells.positions, strict=True)]
    drawn = BlockMap(
        z=z,
        texts=text,
        hover=[[_hover(cells, i, j) for j in range(columns)] for i in range(rows)],
        inks=inks(levels, SEQUENTIAL, reverse=colours.get("reversescale", False)),
        rows=cells.layers,
        columns=labels,
        row_axis="layer",
        column_axis=cells.column_axis if any(cells.inputs) else cells.column_axis.split(" ")[0],
        scale=colours,
        bar=bar,
    )
    return draw_blocks(drawn, size, page, title)


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
    elif cells.kind == "rank":
        lines.append(f"{escape(cells.colour_name.removesuffix(' (1 = top)'))}: {value:.0f}")
    elif cells.kind in ("entropy", "kl"):
        lines.append(f"{escape(cells.colour_name.removesuffix(' (nats)'))} {value:.3f} nats")
    elif cells.targets is not None:
        lines.append(f"{number(value)}: {escape(cells.targets[j])}")
    return "<br>".join(lines)


def _colours(cells: LensCells, scale: Scale) -> tuple[dict[str, Any], dict[str, Any], np.ndarray, np.ndarray]:
    """Settings of the colours and of the colour bar; the level of each cell from 0 to 1; and what is drawn of it.

    Ranks are drawn on a logarithmic scale.
    """
    bar: dict[str, Any] = {"title": {"text": escape(cells.colour_name)}, "thickness": 14}
    colours: dict[str, Any] = {"colorscale": SEQUENTIAL, "zmin": 0, "zmax": 1}
    if cells.kind == "probability":
        ruler = Ruler(cells.colour, scale)
        bar |= ruler.ticks()
        return (
            colours | {"zmin": ruler.low, "zmax": ruler.high},
            bar,
            ruler.levels(cells.colour),
            ruler.places(cells.colour),
        )
    largest = float(np.nanmax(cells.colour)) if not np.isnan(cells.colour).all() else 1.0
    z = cells.colour
    top = largest or 1.0
    if cells.kind == "rank":
        z = np.log10(cells.colour)
        top = max(int(np.ceil(np.log10(max(largest, 2.0)))), 1)
        bar |= {"tickvals": list(range(top + 1)), "ticktext": [f"{10**i:,}" for i in range(top + 1)]}
    return colours | {"reversescale": True, "zmax": top}, bar, z / top, z
