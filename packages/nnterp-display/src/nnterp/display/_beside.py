"""Figures side by side: two prompts, two models, before and after."""

from __future__ import annotations

import html
import json
from typing import Any

import numpy as np
import plotly.graph_objects as go

from nnterp.display._cell_text import inks
from nnterp.display._theme import TEMPLATES
from nnterp.display._view import View


def side_by_side(*figures: go.Figure, title: str | None = None, same_scale: bool = True, show: bool = False) -> View:
    """Put figures next to each other on one page; in a narrow window they stand below each other.

    Args:
        *figures: Figures of this package, such as `plot_lens` of two prompts or of two models.
        title: Plain text above them.
        same_scale: Give a colour bar that all figures have, by its name, the same ends in all of them, so that colours
            can be compared.
        show: Also show the view, in a notebook or a browser.

    Returns:
        A `View`: a page that `nnterp.display.save` writes. The figures that you pass are not changed.

    Raises:
        ValueError: There are fewer than two figures.
        TypeError: One of them is no plotly figure.

    Example:
        >>> import torch
        >>> from nnterp import display
        >>> one, two = (display.plot_patching(torch.full((2, 2), size)) for size in (1.0, 3.0))
        >>> [figure["data"][0]["zmax"] for figure in display.side_by_side(one, two).data["figures"]]
        [3.0, 3.0]
    """
    if len(figures) < 2:
        raise ValueError(f"side_by_side() takes two figures or more, not {len(figures)}.")
    for figure in figures:
        if not isinstance(figure, go.Figure):
            raise TypeError(f"side_by_side() takes plotly figures, not a {type(figure).__name__}.")
    copies = [go.Figure(figure) for figure in figures]
    if same_scale:
        for name in _names(copies[0]):
            if all(name in _names(figure) for figure in copies):
                _share(copies, name)
    ours = all(any(figure.layout.template == template for template in TEMPLATES.values()) for figure in copies)
    data: dict[str, Any] = {"figures": [json.loads(figure.to_json()) for figure in copies]}
    if ours:
        data["templates"] = {name: template.to_plotly_json() for name, template in TEMPLATES.items()}
        data["templates"] = json.loads(go.Figure(layout={"meta": data["templates"]}).to_json())["layout"]["meta"]
    tall = max(int(figure.layout.height or 450) for figure in copies)
    view = View(title or "", "beside.js", data, needs_plotly=True, height=tall + 80)
    if show:
        view.show()
    return view


def _bars(figure: go.Figure) -> list[tuple[str, Any]]:
    """(name, heat map or colour axis) of each colour bar."""
    found = [(trace.colorbar.title.text, trace) for trace in figure.select_traces({"type": "heatmap"})]
    found += [(axis.colorbar.title.text, axis) for axis in figure.select_coloraxes() if axis.cmin is not None]
    return [(html.unescape((name or "").replace("<br>", " ")), bar) for name, bar in found]


def _names(figure: go.Figure) -> list[str]:
    return list(dict.fromkeys(name for name, _ in _bars(figure)))


def _share(figures: list[go.Figure], name: str) -> None:
    """Give the colour bars of that name the lowest and the highest end of all; adapt the colour of texts on them."""
    bars = [(figure, bar) for figure in figures for own, bar in _bars(figure) if own == name]
    ends = [(bar.zmin, bar.zmax) if isinstance(bar, go.Heatmap) else (bar.cmin, bar.cmax) for _, bar in bars]
    low, high = min(end[0] for end in ends), max(end[1] for end in ends)
    for figure, bar in bars:
        if isinstance(bar, go.Heatmap):
            bar.update(zmin=low, zmax=high)
            _ink_cells(figure, bar, low, high)
        else:
            bar.update(cmin=low, cmax=high)
            for trace in figure.select_traces({"type": "bar"}):
                levels = (np.asarray(trace.marker.color, dtype=float) - low) / (high - low)
                trace.insidetextfont.color = inks(levels, bar.colorscale, reverse=bool(bar.reversescale)).tolist()


def _ink_cells(figure: go.Figure, heat: go.Heatmap, low: float, high: float) -> None:
    """Choose anew the colours of the texts in a heat map's cells."""
    z = np.asarray(heat.z, dtype=float)
    columns = {x: j for j, x in enumerate(range(z.shape[1]) if heat.x is None else heat.x)}
    for text in figure.select_traces({"type": "scatter", "mode": "text"}):
        if (text.xaxis, text.yaxis) == (heat.xaxis, heat.yaxis):
            levels = [(z[int(y), columns[x]] - low) / (high - low) for x, y in zip(text.x, text.y, strict=True)]
            text.textfont.color = inks(np.asarray(levels), heat.colorscale, reverse=bool(heat.reversescale)).tolist()
