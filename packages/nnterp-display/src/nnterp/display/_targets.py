"""Probabilities of targets over layers, with a band over prompts."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import plotly.graph_objects as go

from nnterp.display._arrays import as_array, axis_labels, number
from nnterp.display._results.targets import target_curves
from nnterp.display._scales import Ruler, Scale, check_scale
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
    scale: Scale = "linear",
    value: Literal["probability", "rank"] = "probability",
    title: str | None = None,
    show: bool = False,
) -> go.Figure:
    """One line per target category over layers, with a band over prompts.

    Args:
        targets: Category → `[prompts, layers]` (or `[layers]` for one prompt), as
            `run_prompts(..., get_probs_func=logit_lens)` returns, or a result with target probabilities.
        layers: Labels of the layers; 0, 1, … if None.
        band: "quartiles" (line at the median, band from the first to the third quartile), "sd" (mean ± one standard
            deviation), "ci95" (mean ± 1.96 standard errors), or None for the mean alone. NaN is left out.
        unit: Name of the y axis.
        scale: For probabilities: "linear", "log", or "logodds" (log10 of p / (1 − p)), to see probabilities that are
            near 0 in most layers. The axis still says probabilities, and the band and the line are made before they are
            put on the scale.
        value: "rank" draws ranks, 1 for the most probable token, on a logarithmic axis with 1 at the top: the ranks of
            a result (`logit_lens_table(targets=)`), or those that `targets` holds.
        title: Plain text.
        show: Also show the figure, in a notebook or a browser.

    Returns:
        The figure.

    Raises:
        ValueError: There is no layer axis, the categories have different numbers of layers, there is no such `scale` or
            `value`, a result has no ranks, or what is given as ranks or on a scale of probabilities is none.

    Example:
        asked = [Prompt.from_strings("The capital of France is", {"right": "Paris", "wrong": "Rome"}, model)]
        figure = display.plot_targets(run_prompts(model, asked, get_probs_func=logit_lens))
    """
    check_scale(scale)
    if value not in ("probability", "rank"):
        raise ValueError(f"value must be 'probability' or 'rank', not {value!r}.")
    if value == "rank" and scale != "linear":
        raise ValueError(f"scale={scale!r} is a scale of probabilities; ranks have a logarithmic axis already.")
    if not isinstance(targets, Mapping):
        read = target_curves(targets, value)
        targets = read.curves
        layers = read.layers if layers is None else layers
        title = read.title if title is None else title
    if not targets:
        raise ValueError("There are no targets to draw: give category → [prompts, layers].")
    if band is not None and band not in _BANDS:
        raise ValueError(f"band must be one of {', '.join(map(repr, _BANDS))} or None, not {band!r}.")
    curves = {name: _by_prompt(name, values) for name, values in targets.items()}
    lengths = {name: curve.shape[1] for name, curve in curves.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"All targets must have the same number of layers; they have {lengths}.")
    rows = axis_labels(layers, next(iter(lengths.values())), "layers", "the layer axis of the targets")
    prompts = max(curve.shape[0] for curve in curves.values())
    band_drawn = band if prompts > 1 else None

    for name, curve in curves.items():
        _check_values(name, curve, value, scale)

    figure = new_figure(title)
    drawn = [
        _Curve(values, *_summary(values, band), visible_name(name), i)
        for i, (name, values) in enumerate(curves.items())
    ]
    ruler = Ruler(np.concatenate([[*curve.line, *curve.low, *curve.high] for curve in drawn]), scale)
    for own in drawn:
        placed = own.on(ruler)
        if band_drawn is not None:
            figure.add_trace(_band_trace(placed))
        figure.add_trace(_line_trace(own, placed.line, rows, band_drawn))
    _lay_out(figure, rows, "rank (1 = top)" if value == "rank" and unit == "probability" else unit, list(curves))
    _set_scale(figure, ruler, drawn, value)
    note = f"{_BANDS[band_drawn]} ({prompts} prompts)" if band_drawn is not None else ""
    note = "; ".join(filter(None, (note, ruler.note())))
    if note:
        lines = textwrap.wrap(note, max(int((figure.layout.width - 80) / 6), 40))
        figure.update_layout(height=figure.layout.height + 14 * len(lines), margin_b=84 + 14 * (len(lines) - 1))
        note = "<br>".join(lines)
        figure.add_annotation(
            text=note,
            xref="paper",
            yref="paper",
            x=0,
            y=0,
            yshift=-54,
            xanchor="left",
            yanchor="top",
            align="left",
            font_size=11,
        )
    return shown(figure, show)


def visible_name(name: Any) -> str:
    """A category's name as visible text; spaces inside it stay spaces, those at its ends are shown as `·`."""
    return visible(str(name)).replace("·", " ") if str(name).strip() == str(name) else visible(str(name))


@dataclass(frozen=True)
class _Curve:
    """One target: its values `[prompts, layers]`, the line and the band's edges `[layers]`, name and number."""

    values: np.ndarray
    line: np.ndarray
    low: np.ndarray
    high: np.ndarray
    name: str
    index: int

    def on(self, ruler: Ruler) -> _Curve:
        """The same curve with line and band in places on a scale."""
        line, low, high = (ruler.places(part) for part in (self.line, self.low, self.high))
        return replace(self, line=line, low=low, high=high)

    @property
    def label(self) -> str:
        return escape(shorten(self.name, 32))

    @property
    def colour(self) -> str:
        return LINES[self.index % len(LINES)]


def _by_prompt(name: Any, values: Any) -> np.ndarray:
    """The values of one target as `[prompts, layers]`."""
    curve = as_array(values, f"target {name!r} ([prompts, layers] or [layers])", 1, 2)
    return curve[None] if curve.ndim == 1 else curve


def _check_values(name: Any, curve: np.ndarray, value: str, scale: Scale) -> None:
    """Check that a curve can be drawn as ranks, or on a scale of probabilities."""
    if np.isnan(curve).all():
        return
    low, high = float(np.nanmin(curve)), float(np.nanmax(curve))
    if value == "rank" and low < 1:
        raise ValueError(f"Target {name!r} holds {low:g}, which is no rank; ranks are counted from 1.")
    if scale != "linear" and (low < 0 or high > 1.02):
        raise ValueError(
            f"Target {name!r} holds numbers from {low:g} to {high:g}; scale={scale!r} is for probabilities."
        )


def _summary(values: np.ndarray, band: Band | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The line, and the lower and the upper edge of the band."""
    if band == "quartiles":
        low, line, high = np.nanquantile(values, [0.25, 0.5, 0.75], axis=0)
        return line, low, high
    line = np.nanmean(values, axis=0)
    count = np.maximum((~np.isnan(values)).sum(0), 1)
    spread = np.zeros_like(line) if values.shape[0] == 1 else np.nanstd(values, axis=0, ddof=1)
    if band == "ci95":
        spread = 1.96 * spread / np.sqrt(count)
    return line, line - spread, line + spread


def _band_trace(curve: _Curve) -> go.Scatter:
    x = list(range(len(curve.line)))
    red, green, blue = (int(curve.colour[i : i + 2], 16) for i in (1, 3, 5))
    return go.Scatter(
        x=[*x, *reversed(x)],
        y=[*curve.high, *curve.low[::-1]],
        fill="toself",
        fillcolor=f"rgba({red},{green},{blue},0.3)",
        line={"width": 1, "color": f"rgba({red},{green},{blue},0.75)"},
        mode="lines",
        legendgroup=curve.label,
        showlegend=False,
        hoverinfo="skip",
    )


def _line_trace(curve: _Curve, places: np.ndarray, rows: list[str], band: Band | None) -> go.Scatter:
    return go.Scatter(
        x=list(range(len(rows))),
        y=places,
        name=curve.label,
        legendgroup=curve.label,
        mode="lines+markers",
        line={"color": curve.colour, "width": 2.5, "dash": DASHES[curve.index % len(DASHES)]},
        marker={"color": curve.colour, "size": 6, "symbol": SYMBOLS[curve.index % len(SYMBOLS)]},
        hovertext=[_hover(curve, layer, rows[layer], band) for layer in range(len(rows))],
        hovertemplate="%{hovertext}<extra></extra>",
    )


def _hover(curve: _Curve, layer: int, label: str, band: Band | None) -> str:
    lines = [escape(curve.name), f"layer {escape(label)}: {number(curve.line[layer])}"]
    if band is not None:
        edges = f"{number(curve.low[layer])} to {number(curve.high[layer])}"
        lines.append(f"{'quartiles' if band == 'quartiles' else 'band'} {edges}")
        lines.append(f"{int((~np.isnan(curve.values[:, layer])).sum())} prompts")
    return "<br>".join(lines)


def _set_scale(figure: go.Figure, ruler: Ruler, curves: list[_Curve], value: str) -> None:
    """Set the y axis to the scale of probabilities, or to ranks."""
    if value == "rank":
        most = max(float(np.nanmax(curve.high)) for curve in curves if not np.isnan(curve.high).all())
        decades = max(float(np.ceil(np.log10(max(most, 2.0)))), 1.0)
        at = list(range(int(decades) + 1))
        figure.update_yaxes(type="log", range=[decades, -0.08], tickformat=None, rangemode="normal")
        figure.update_yaxes(tickmode="array", tickvals=[10**i for i in at], ticktext=[f"{10**i:,}" for i in at])
    elif ruler.scale != "linear":
        room = 0.03 * (ruler.high - ruler.low)
        figure.update_yaxes(**ruler.ticks(), range=[ruler.low - room, ruler.high + room], rangemode="normal")


def _lay_out(figure: go.Figure, rows: list[str], unit: str, names: list[Any]) -> None:
    """Set axes, legend and size; the legend gets as much room as its longest name needs."""
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
    legend = max(width(shorten(visible_name(name), 32)) for name in names) * 8 + 70
    figure.update_layout(
        width=pixels + 70 + legend,
        height=420,
        showlegend=True,
        margin={"l": 64, "r": legend, "t": 64, "b": 84},
        legend={"x": 1.02, "y": 1, "xanchor": "left", "yanchor": "top"},
    )
