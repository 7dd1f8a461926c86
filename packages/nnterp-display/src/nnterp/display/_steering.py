"""Effect of a steering against its damage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from nnterp.display._arrays import as_array, axis_labels, number
from nnterp.display._results.labelled import is_numbers
from nnterp.display._results.steering import SteeringPoints, steering_points
from nnterp.display._text import escape
from nnterp.display._theme import DASHES, LINES, SYMBOLS, new_figure, shown


def plot_steering(
    effect: Any,
    damage: Any = None,
    *,
    layers: Sequence[Any] | None = None,
    factors: Sequence[Any] | None = None,
    plain: float | None = None,
    title: str | None = None,
    show: bool = False,
) -> go.Figure:
    """Effect against damage, a line for each layer and a point for each factor; up and to the left is better.

    Args:
        effect: `[layers, factors]`, or the result of `nnterp.interventions.steering_sweep`.
        damage: `[layers, factors]`; for a result, the name of the measure to draw ("kl", "perplexity", ...), by default
            its first.
        layers: Labels of the layers; 0, 1, … if None.
        factors: Labels of the factors; 0, 1, … if None.
        plain: The damage without steering, drawn as a dotted line; taken from a result if None.
        title: Plain text.
        show: Also show the figure, in a notebook or a browser.

    Returns:
        The figure. Each line follows the factors from small to large; hovering says layer, factor, effect and damage.

    Raises:
        ValueError: Effect and damage differ in shape, labels do not fit, or a result has no such measure.

    Example:
        >>> from nnterp import display
        >>> figure = display.plot_steering([[0.0, 1.0]], [[0.0, 0.2]], layers=[5], factors=[0, 2])
        >>> figure.data[0].name
        '5'
    """
    if is_numbers(effect):
        if not is_numbers(damage):
            raise ValueError("Give damage as well, [layers, factors].")
        seen = as_array(effect, "effect ([layers, factors])", 2)
        read = SteeringPoints(
            seen, as_array(damage, "damage ([layers, factors])", 2), plain, (), (), "effect", "damage", ""
        )
    else:
        read = steering_points(effect, damage)
        layers = read.layers if layers is None else layers
        factors = read.factors if factors is None else factors
    if read.effect.shape != read.damage.shape:
        raise ValueError(
            f"effect has shape {list(read.effect.shape)} and damage {list(read.damage.shape)}; both are "
            "[layers, factors]."
        )
    rows = axis_labels(layers, read.effect.shape[0], "layers", "the first axis of effect")
    columns = axis_labels(factors, read.effect.shape[1], "factors", "the second axis of effect")
    figure = new_figure(title if title is not None else read.title or None)
    order = _order(columns)
    for i, row in enumerate(rows):
        figure.add_trace(_line(read, i, row, columns, order))
    if (read.plain if plain is None else plain) is not None:
        figure.add_vline(x=read.plain if plain is None else plain, line={"dash": "dot", "width": 1})
    figure.update_xaxes(title_text=escape(read.damage_name), zeroline=False)
    figure.update_yaxes(title_text=escape(read.effect_name))
    figure.update_layout(
        width=760,
        height=460,
        showlegend=True,
        margin={"l": 72, "r": 140, "t": 64, "b": 64},
        legend={"x": 1.02, "y": 1, "xanchor": "left", "yanchor": "top", "title": {"text": "layer"}},
    )
    return shown(figure, show)


def _order(factors: list[str]) -> list[int]:
    """The places of the factors by size, so that a line does not cross itself; as given if they are no numbers."""
    try:
        return sorted(range(len(factors)), key=lambda i: float(factors[i]))
    except ValueError:
        return list(range(len(factors)))


def _line(read: SteeringPoints, layer: int, label: str, factors: list[str], order: list[int]) -> go.Scatter:
    colour = LINES[layer % len(LINES)]
    effect, damage = np.asarray(read.effect[layer])[order], np.asarray(read.damage[layer])[order]
    hover = [
        "<br>".join(
            [
                f"layer {escape(label)}, factor {escape(factors[i])}",
                f"{escape(read.effect_name)} {number(read.effect[layer, i])}",
                f"{escape(read.damage_name)} {number(read.damage[layer, i])}",
            ]
        )
        for i in order
    ]
    return go.Scatter(
        x=damage,
        y=effect,
        name=escape(label),
        mode="lines+markers",
        line={"color": colour, "width": 2, "dash": DASHES[layer // len(LINES) % len(DASHES)]},
        marker={"color": colour, "size": 7, "symbol": SYMBOLS[layer % len(SYMBOLS)]},
        hovertext=hover,
        hovertemplate="%{hovertext}<extra></extra>",
    )
