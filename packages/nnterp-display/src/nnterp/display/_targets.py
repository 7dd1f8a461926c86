"""Probabilities of targets over layers, with a band over prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import plotly.graph_objects as go

from nnterp.display._arrays import as_array, number
from nnterp.display._grid import axis_labels
from nnterp.display._target_curves import curves_of_result
from nnterp.display._text import escape
from nnterp.display._theme import DASHES, LINES, SYMBOLS, new_figure, shown
from nnterp.token_text import shorten, visible, width

Band = Literal["quartiles", "sd", "ci95"]
_BANDS = {
    "quartiles": "median, band: middle half of the prompts",
    "sd": "mean, band: ± 1 standard deviation over prompts",
    "ci95": "mean, band: 95 % confidence interval of the mean over prompts (normal)",
}


def plot_targets(
    targets: Any,
    *,
    layers: Sequence[Any] | None = None,
    band: Band | None = "quartiles",
    unit: str = "probability",
    title: str | None = None,
    show: bool = False,
) -> go.Figure:
    """One line per target category over layers, with a band over prompts.

    Args:
        targets: Category → `[prompts, layers]` (or `[layers]` for one prompt), as
            `run_prompts(..., get_probs_func=logit_lens)` returns, or the result object of such a run.
        layers: Labels of the layers; 0, 1, … if None.
        band: "quartiles" (line at the median, band from the first to the third quartile), "sd" (mean ± one standard
            deviation), "ci95" (mean ± 1.96 standard errors), or None for the mean alone. NaN is left out.
        unit: Name of the y axis.
        title: Plain text.
        show: Also show the figure, in a notebook or a browser.

    Returns:
        The figure.

    Raises:
        ValueError: There is no layer axis, or the categories have different numbers of layers.
        TypeError: `targets` is neither a mapping nor a result.
    """
    if not isinstance(targets, Mapping):
        own = curves_of_result(targets)
        targets = own.curves
        layers = own.layers if layers is None else layers
        title = own.title if title is None else title
    if not targets:
        raise ValueError("There are no targets to draw: give category → [prompts, layers].")
    if band is not None and band not in _BANDS:
        raise ValueError(f"band must be one of {', '.join(map(repr, _BANDS))} or None, not {band!r}.")
    curves = {name: _curve(name, values) for name, values in targets.items()}
    lengths = {name: curve.shape[1] for name, curve in curves.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"All targets must have the same number of layers; they have {lengths}.")
    count = next(iter(lengths.values()))
    rows = axis_labels("layers", layers, count, "the layer axis of the targets")

    prompts = max(curve.shape[0] for curve in curves.values())
    drawn_band = band if prompts > 1 else None
    figure = new_figure(title)
    for i, (name, curve) in enumerate(curves.items()):
        figure.add_traces(_traces(i, _visible_name(name), curve, rows, band, drawn_band))
    legend = max(width(shorten(_visible_name(name), 32)) for name in curves) * 8 + 70
    _lay_out(figure, rows, unit, legend)
    if drawn_band is not None:
        figure.add_annotation(
            text=f"{_BANDS[drawn_band]} ({prompts} prompts)",
            xref="paper",
            yref="paper",
            x=0,
            y=0,
            yshift=-72,
            xanchor="left",
            yanchor="bottom",
            font_size=11,
        )
    return shown(figure, show)


def _traces(
    i: int, name: str, curve: np.ndarray, rows: list[str], band: Band | None, drawn_band: Band | None
) -> list[go.Scatter]:
    """The line of one category, and under it the band if one is drawn."""
    label = escape(shorten(name, 32))
    line, low, high = _summary(curve, band)
    colour = LINES[i % len(LINES)]
    x = list(range(len(rows)))
    traces = [] if drawn_band is None else [_band(x, low, high, colour, label)]
    traces.append(
        go.Scatter(
            x=x,
            y=line,
            name=label,
            legendgroup=label,
            mode="lines+markers",
            line={"color": colour, "width": 2.5, "dash": DASHES[i % len(DASHES)]},
            marker={"color": colour, "size": 6, "symbol": SYMBOLS[i % len(SYMBOLS)]},
            hovertext=[_hover(escape(name), rows[j], curve[:, j], line[j], low[j], high[j], drawn_band) for j in x],
            hovertemplate="%{hovertext}<extra></extra>",
        )
    )
    return traces


def _lay_out(figure: go.Figure, rows: list[str], unit: str, legend: int) -> None:
    """Axes and size of the figure, with `legend` pixels for the legend."""
    count = len(rows)
    pixels = max(560, min(18 * count, 1100))
    every = next((step for step in (1, 2, 5, 10, 20, 50) if pixels / max(count, 1) * step >= 26), 100)
    figure.update_xaxes(
        title_text="layer",
        tickmode="array",
        tickvals=list(range(count))[::every],
        ticktext=[escape(row) for row in rows[::every]],
        range=[-0.5, count - 0.5],
        zeroline=False,
    )
    figure.update_yaxes(title_text=escape(unit), rangemode="tozero")
    if unit == "probability":
        figure.update_yaxes(range=[-0.02, 1.02], tickformat=".1f")
    figure.update_layout(
        width=pixels + 70 + legend,
        height=420,
        showlegend=True,
        legend={"x": 1.02, "y": 1, "xanchor": "left", "yanchor": "top"},
        margin={"l": 64, "r": legend, "t": 64, "b": 84},
    )


def _visible_name(name: Any) -> str:
    """A category's name as visible text; inner spaces stay spaces unless the name starts or ends with white space."""
    return visible(str(name)).replace("·", " ") if str(name).strip() == str(name) else visible(str(name))


def _curve(name: Any, values: Any) -> np.ndarray:
    curve = as_array(values, f"target {name!r} ([prompts, layers] or [layers])", 1, 2)
    return curve[None] if curve.ndim == 1 else curve


def _summary(curve: np.ndarray, band: Band | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Line, lower and upper end of the band at each layer, NaN left out."""
    if band == "quartiles":
        low, line, high = np.nanquantile(curve, [0.25, 0.5, 0.75], axis=0)
        return line, low, high
    line = np.nanmean(curve, axis=0)
    seen = np.maximum((~np.isnan(curve)).sum(0), 1)
    spread = np.zeros_like(line) if curve.shape[0] == 1 else np.nanstd(curve, axis=0, ddof=1)
    if band == "ci95":
        spread = 1.96 * spread / np.sqrt(seen)
    return line, line - spread, line + spread


def _band(x: list[int], low: np.ndarray, high: np.ndarray, colour: str, group: str) -> go.Scatter:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return go.Scatter(
        x=[*x, *reversed(x)],
        y=[*high, *low[::-1]],
        fill="toself",
        fillcolor=f"rgba({red},{green},{blue},0.2)",
        line={"width": 0},
        mode="lines",
        legendgroup=group,
        showlegend=False,
        hoverinfo="skip",
    )


def _hover(name: str, layer: str, values: np.ndarray, line: float, low: float, high: float, band: Band | None) -> str:
    lines = [name, f"layer {escape(layer)}: {number(line)}"]
    if band is not None:
        lines.append(f"{'quartiles' if band == 'quartiles' else 'band'} {number(low)} to {number(high)}")
        lines.append(f"{int((~np.isnan(values)).sum())} prompts")
    return "<br>".join(lines)
