"""The contexts in which a feature is most active, each token coloured by the activation."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go

from nnterp.arguments import count
from nnterp.display._arrays import number
from nnterp.display._cell_text import inks
from nnterp.display._results.features import contexts_of
from nnterp.display._text import escape
from nnterp.display._theme import SEQUENTIAL, new_figure, shown
from nnterp.display._tokens import bar_below, boxes, lay_out
from nnterp.token_text import shorten, width

_LONGEST = 24


def plot_features(
    report: Any,
    feature: int | None = None,
    *,
    top: int | None = 10,
    title: str | None = None,
    show: bool = False,
) -> go.Figure:
    """The texts that activate a feature most, one a line, strongest first, each token coloured by the activation there.

    Args:
        report: The result of `nnterp.interventions.feature_report`.
        feature: Which feature; not needed if the report holds one.
        top: The largest number of contexts to draw; all if None.
        title: Plain text.
        show: Also show the figure, in a notebook or a browser.

    Returns:
        The figure, coloured from 0 to the largest activation. Hovering says the position relative to the peak, the
        token and its activation.

    Raises:
        TypeError: `report` is no result.
        ValueError: It does not hold the feature, or the feature is not active on any text.

    Example:
        texts = ["The capital of Japan is Tokyo.", "Kyoto is a city in Japan."]
        report = feature_report(model, nnterp.toy_dictionary("transcoder_0"), texts, features=[206])
        figure = display.plot_features(report, 206)
    """
    read = contexts_of(report, feature, None if top is None else count(top, "top"))
    texts, starts, lines, hover, values = [], [], [], [], []
    for line, (tokens, own) in enumerate(zip(read.tokens, read.values, strict=True)):
        at = 0
        peak = int(np.nanargmax(own))
        for i, name in enumerate(tokens):
            text = shorten(name, _LONGEST)
            texts.append(text)
            starts.append(at)
            lines.append(line)
            hover.append(f"{i - peak:+d} from the peak  {escape(name)}<br>activation {number(own[i])}")
            at += width(text) + 1
        values.append(own)
    numbers = np.concatenate(values)
    high = float(np.nanmax(numbers))
    figure = new_figure(_title(read.title, read.density) if title is None else title)
    ink = inks(numbers / high, SEQUENTIAL, reverse=False)
    figure.add_trace(boxes(texts, starts, lines, numbers, hover, ink))
    figure.update_layout(
        coloraxis={"colorscale": SEQUENTIAL, "cmin": 0.0, "cmax": high, "colorbar": bar_below("activation")}
    )
    longest = max(start + width(text) + 1 for start, text in zip(starts, texts, strict=True))
    lay_out(figure, longest, lines[-1] + 1, 64)
    return shown(figure, show)


def _title(title: str | None, density: float | None) -> str | None:
    return title if density is None or title is None else f"{title}, active at {100 * density:.2g} % of positions"
