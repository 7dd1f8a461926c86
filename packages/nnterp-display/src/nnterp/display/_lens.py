"""The logit-lens grid: what each layer would say at each position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import plotly.graph_objects as go

from nnterp.display import _adapt
from nnterp.display._arrays import as_array, check_probabilities, number
from nnterp.display._cell_text import cell_text, inks
from nnterp.display._grid import Cells, check_same, fit, label_pixels, number_ticks, token_ticks
from nnterp.display._text import as_names, escape
from nnterp.display._theme import SEQUENTIAL, new_figure, shown
from nnterp.token_text import TokenNames, shorten, width

Colour = Literal["probability", "rank", "entropy"]


@dataclass(frozen=True)
class LensCells:
    """Everything the grid shows, per layer and position.

    Attributes:
        tokens: `[layers][positions][k]`, visible texts, most probable first.
        probabilities: `[layers, positions, k]`.
        colour: `[layers, positions]`, what the cell is coloured by.
        colour_name: What that is, with its unit.
        kind: Which of the three it is.
        layers, positions: Labels of the axes.
        inputs: The input token at each position.
        targets: Per position the token that `colour` is about, None where it is about the top token.
        column_axis: What the columns are.
    """

    tokens: list[list[list[str]]]
    probabilities: np.ndarray
    colour: np.ndarray
    colour_name: str
    kind: Colour
    layers: list[str]
    positions: list[int]
    inputs: list[str]
    targets: list[str] | None = None
    column_axis: str = "position (input token)"


LABELS: dict[tuple[str, bool], str] = {
    ("probability", False): "probability of the top token",
    ("probability", True): "probability of the target",
    ("rank", True): "rank of the target (1 = top)",
    ("rank", False): "rank of the last layer's token (1 = top)",
    ("entropy", False): "entropy (nats)",
}


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
        tokenizer: Names the tokens; the result's own if it has one. Without one, ids are shown.
        tokens: The input tokens of the columns, as ids or texts; their positions if None.
        layers: Labels of the rows; 0, 1, … if None.
        prompt: Which prompt of a result with several.
        color: "probability" of the top token, "rank" of the token the last layer says, or "entropy" of the distribution
            in nats. Bright is certain in all three.
        target: A token id, or one per position, that "probability" and "rank" are about instead; of a result, one of
            its targets ("rank" takes the first, if none is named).
        top_k: How many tokens hovering shows.
        title: Plain text.
        show: Also show the figure, in a notebook or a browser.

    Returns:
        The figure, sized so that each token can be read.

    Raises:
        ValueError: `lens` are no probabilities, or labels do not fit their axis.
    """
    if not _adapt.is_numbers(lens):
        if target is not None and not hasattr(target, "__index__"):
            raise ValueError("Of a result, target is one token id: each prompt has its own list of targets.")
        cells, own_title = _adapt.lens_cells(
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
        cells = _cells(lens, tokenizer, tokens, layers, color, target, top_k)
    return shown(draw(cells, title), show)


def _cells(
    lens: Any,
    tokenizer: Any,
    tokens: Sequence[Any] | None,
    layers: Sequence[Any] | None,
    kind: Colour,
    target: Any,
    top_k: int,
) -> LensCells:
    probs = as_array(lens, "lens ([layers, positions, vocab])", 2, 3)
    probs = probs[:, None] if probs.ndim == 2 else probs
    check_probabilities(probs, "lens")
    num_layers, num_positions, vocab = probs.shape
    top_k = min(max(top_k, 1), vocab)
    order = np.argsort(-probs, axis=-1, kind="stable")[..., :top_k] if vocab <= 4096 else _top(probs, top_k)
    names = TokenNames(tokenizer)
    texts = [[names.many(order[i, j]) for j in range(num_positions)] for i in range(num_layers)]
    inputs = [""] * num_positions if tokens is None else as_names(tokens, tokenizer)
    check_same("tokens", len(inputs), num_positions, "the position axis of lens")
    rows = [str(i) for i in range(num_layers)] if layers is None else [str(layer) for layer in layers]
    check_same("layers", len(rows), num_layers, "the layer axis of lens")
    about = _targets(target, num_positions, vocab)
    chosen = None if about is None else names.many(about)
    if kind == "entropy":
        colour = -(probs * np.log(np.where(probs > 0, probs, 1.0))).sum(-1)
        chosen = None
    elif kind == "rank":
        about = order[-1, :, 0] if about is None else about
        chosen = names.many(about)
        of = np.take_along_axis(probs, np.broadcast_to(about[None, :, None], (num_layers, num_positions, 1)), -1)
        colour = (probs > of).sum(-1) + 1.0
    elif kind == "probability":
        if about is None:
            colour = np.take_along_axis(probs, order[..., :1], -1)[..., 0]
        else:
            of = np.broadcast_to(about[None, :, None], (num_layers, num_positions, 1))
            colour = np.take_along_axis(probs, of, -1)[..., 0]
    else:
        raise ValueError(f"color must be 'probability', 'rank' or 'entropy', not {kind!r}.")
    shown = np.take_along_axis(probs, order, -1)
    label = LABELS[kind, target is not None and kind != "entropy"]
    return LensCells(texts, shown, colour, label, kind, rows, list(range(num_positions)), inputs, chosen)


def _top(probs: np.ndarray, k: int) -> np.ndarray:
    """Indices of the `k` largest, largest first, without sorting a whole vocabulary."""
    some = np.argpartition(-probs, k - 1, axis=-1)[..., :k]
    order = np.argsort(-np.take_along_axis(probs, some, -1), axis=-1, kind="stable")
    return np.take_along_axis(some, order, -1)


def _targets(target: Any, positions: int, vocab: int) -> np.ndarray | None:
    if target is None:
        return None
    ids = np.asarray(target.cpu() if hasattr(target, "cpu") else target, dtype=int).reshape(-1)
    ids = np.repeat(ids, positions) if ids.size == 1 else ids
    check_same("target", ids.size, positions, "the position axis of lens")
    if ids.min() < 0 or ids.max() >= vocab:
        raise ValueError(
            f"target {int(ids.max() if ids.max() >= vocab else ids.min())} is not in the vocabulary of {vocab}."
        )
    return ids


def draw(cells: LensCells, title: str | None) -> go.Figure:
    """The figure of one grid."""
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


def _colour_scale(cells: LensCells) -> tuple[dict, dict]:
    bar = {"title": {"text": cells.colour_name}, "thickness": 14}
    if cells.kind == "probability":
        return {"colorscale": SEQUENTIAL, "zmin": 0, "zmax": 1}, bar
    if cells.kind == "entropy":
        top = float(np.nanmax(cells.colour)) or 1.0
        return {"colorscale": SEQUENTIAL, "reversescale": True, "zmin": 0, "zmax": top}, bar
    decades = max(int(np.ceil(np.log10(max(float(np.nanmax(cells.colour)), 2.0)))), 1)
    ticks = {"tickvals": list(range(decades + 1)), "ticktext": [f"{10**i:,}" for i in range(decades + 1)]}
    return {"colorscale": SEQUENTIAL, "reversescale": True, "zmin": 0, "zmax": decades}, {**bar, **ticks}
