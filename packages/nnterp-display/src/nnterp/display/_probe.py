"""Accuracy of a linear probe at each layer, beside its null controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from nnterp.display._arrays import as_array, axis_labels, number
from nnterp.display._results.labelled import is_numbers
from nnterp.display._results.probe import Accuracies, accuracies
from nnterp.display._text import escape
from nnterp.display._theme import DASHES, LINES, SYMBOLS, new_figure, shown


def plot_probe(
    accuracy: Any,
    controls: Mapping[str, Any] | None = None,
    *,
    layers: Sequence[Any] | None = None,
    majority: float | None = None,
    title: str | None = None,
    show: bool = False,
) -> go.Figure:
    """Held-out accuracy at each layer as a line, and each null control as a line with a band over its repeats.

    A layer says something about the two classes where its accuracy is above the bands and above the dotted line, which
    is what always naming the larger class would give.

    Args:
        accuracy: `[layers]`, shares between 0 and 1, or the result of `nnterp.interventions.probe`.
        controls: Accuracies of null controls, `[layers, repeats]`, by name; those of a result if None.
        layers: Labels of the layers; 0, 1, … if None.
        majority: The share of the larger class, drawn as a dotted line; taken from a result if None.
        title: Plain text.
        show: Also show the figure, in a notebook or a browser.

    Returns:
        The figure. A control's line is its mean, and its band reaches from its least to its greatest repeat. Hovering
        says the layer, the accuracy and, for a result, the least and the greatest fold.

    Raises:
        TypeError: `accuracy` is neither numbers nor a result.
        ValueError: Controls or labels do not fit the layers, a number is no share between 0 and 1, or a result has no
            accuracy by layer.

    Example:
        >>> from nnterp import display
        >>> figure = display.plot_probe([0.5, 0.9], {"shuffled labels": [[0.4, 0.6], [0.5, 0.5]]})
        >>> [trace.name for trace in figure.data if trace.showlegend is not False]
        ['probe', 'shuffled labels']
    """
    if is_numbers(accuracy):
        read = Accuracies(as_array(accuracy, "accuracy ([layers])", 1), None, {}, None, (), "")
    else:
        read = accuracies(accuracy)
        layers = read.layers if layers is None else layers
    if controls is None:
        null = dict(read.controls)
    else:
        null = {name: as_array(one, f"controls[{name!r}] ([layers, repeats])", 2) for name, one in controls.items()}
    rows = axis_labels(layers, len(read.accuracy), "layers", "the axis of accuracy")
    for name, one in null.items():
        if one.shape[0] != len(rows):
            raise ValueError(f"controls[{name!r}] has {one.shape[0]} layers, and accuracy has {len(rows)}.")
    common = read.majority if majority is None else majority
    _check_shares({"accuracy": read.accuracy, **null, "majority": np.array(np.nan if common is None else common)})
    figure = new_figure(title if title is not None else read.title or None)
    for i, (name, one) in enumerate(null.items(), 1):
        figure.add_trace(_band(one, LINES[i % len(LINES)], name))
    figure.add_trace(_line("probe", read.accuracy, read.folds, rows, 0, "folds"))
    for i, (name, one) in enumerate(null.items(), 1):
        figure.add_trace(_line(name, one.mean(1), one, rows, i, "repeats"))
    if common is not None:
        figure.add_trace(_constant("larger class", common, len(rows)))
    step = max(1, -(-len(rows) // 24))
    ticks = list(range(0, len(rows), step))
    figure.update_xaxes(title_text="layer", tickvals=ticks, ticktext=[escape(rows[i]) for i in ticks], zeroline=False)
    lowest = [0.0 if not np.isfinite(v).any() else float(np.nanmin(v)) for v in (read.accuracy, *null.values())]
    figure.update_yaxes(title_text="held-out accuracy", range=[min(0.4, *lowest) - 0.03, 1.03], zeroline=False)
    figure.update_layout(
        width=660,
        height=460,
        showlegend=True,
        margin={"l": 72, "r": 190, "t": 64, "b": 64},
        legend={"x": 1.02, "y": 1, "xanchor": "left", "yanchor": "top"},
    )
    return shown(figure, show)


def _check_shares(given: Mapping[str, np.ndarray]) -> None:
    """Raise for numbers that would be drawn outside of the figure; NaN is ignored."""
    for name, values in given.items():
        wrong = values[(values < 0) | (values > 1)]
        if wrong.size:
            raise ValueError(f"{name} holds {wrong.flat[0]:g}, and an accuracy is a share between 0 and 1.")


def _band(values: np.ndarray, colour: str, name: str) -> go.Scatter:
    """From the least to the greatest repeat at each layer."""
    x = list(range(len(values)))
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return go.Scatter(
        x=[*x, *reversed(x)],
        y=[*values.max(1), *values.min(1)[::-1]],
        fill="toself",
        fillcolor=f"rgba({red},{green},{blue},0.25)",
        line={"width": 0},
        mode="lines",
        legendgroup=escape(name),
        showlegend=False,
        hoverinfo="skip",
    )


def _constant(name: str, value: float, layers: int) -> go.Scatter:
    return go.Scatter(
        x=list(range(layers)),
        y=[value] * layers,
        name=name,
        mode="lines",
        line={"color": "#8a919c", "width": 1.5, "dash": "dot"},  # seen on white and on black
        hovertemplate=f"{name} {number(value)}<extra></extra>",
    )


def _line(name: str, values: np.ndarray, spread: np.ndarray | None, rows: list[str], index: int, of: str) -> go.Scatter:
    colour = LINES[index % len(LINES)]
    hover = []
    for i, row in enumerate(rows):
        lines = [escape(name), f"layer {escape(row)}: {number(values[i])}"]
        if spread is not None:
            lines.append(f"{of} {number(spread[i].min())} to {number(spread[i].max())}")
        hover.append("<br>".join(lines))
    return go.Scatter(
        x=list(range(len(rows))),
        y=values,
        name=escape(name),
        legendgroup=escape(name),
        mode="lines+markers",
        line={"color": colour, "width": 2.5 if index == 0 else 1.5, "dash": DASHES[index % len(DASHES)]},
        marker={"color": colour, "size": 7 if index == 0 else 5, "symbol": SYMBOLS[index % len(SYMBOLS)]},
        hovertext=hover,
        hovertemplate="%{hovertext}<extra></extra>",
    )
