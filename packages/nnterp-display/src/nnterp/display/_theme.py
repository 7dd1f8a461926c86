"""The look of all figures: a light and a dark template, colours that colour-blind readers can tell apart, fonts."""

from __future__ import annotations

import html
import math
import textwrap
from typing import Any, Literal

import plotly.graph_objects as go
import plotly.io as pio

from nnterp.display._text import escape, escape_lines

Theme = Literal["light", "dark"]

SEQUENTIAL = "Cividis"  # Nuñez, Anderton and Renslow 2018: made for colour-vision deficiency, monotone in lightness
DIVERGING = "RdBu"  # ColorBrewer, colour-blind safe; white at zero
# Okabe and Ito 2008, without black and yellow; first those with the most contrast on both white and black.
LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
SYMBOLS = ("circle", "diamond", "square", "triangle-up", "cross", "x")

SANS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', Arial, sans-serif"
MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', 'Liberation Mono', monospace"
_TITLE = 16  # size of the font of titles
_TOOLBAR = 32  # pixels at the top of a figure that titles leave to plotly's toolbar
_ROOM = 640  # pixels: narrower figures become as wide as their title, up to this
MONO_WIDTH = 0.62  # width of a character over the font size, in the widest of the fonts in MONO
_SANS_WIDTH = 0.53  # the same of SANS, on average

_INKS = {
    "light": {"paper": "#ffffff", "ink": "#1f2430", "soft": "#5c6370", "grid": "#e3e6ea", "panel": "#f4f6f8"},
    "dark": {"paper": "#14171c", "ink": "#e8eaed", "soft": "#a8b0ba", "grid": "#333a44", "panel": "#1d222a"},
}


def _template(theme: Theme) -> go.layout.Template:
    ink = _INKS[theme]
    axis = {
        "gridcolor": ink["grid"],
        "zerolinecolor": ink["grid"],
        "linecolor": ink["soft"],
        "tickcolor": ink["soft"],
        "title": {"font": {"size": 13, "color": ink["soft"]}, "standoff": 10},
        "tickfont": {"size": 11, "color": ink["ink"]},
        "automargin": True,
    }
    table = {
        "header": {"fill": {"color": ink["panel"]}, "font": {"color": ink["ink"]}, "line": {"color": ink["grid"]}},
        "cells": {"fill": {"color": ink["paper"]}, "font": {"color": ink["ink"]}, "line": {"color": ink["grid"]}},
    }
    return go.layout.Template(
        layout={
            "paper_bgcolor": ink["paper"],
            "plot_bgcolor": ink["paper"],
            "font": {"family": SANS, "size": 13, "color": ink["ink"]},
            "title": {
                "font": {"size": _TITLE, "color": ink["ink"]},
                "x": 0,
                "xref": "paper",
                "xanchor": "left",
                "y": 1,
                "yref": "container",
                "yanchor": "top",
                "pad": {"t": _TOOLBAR},
            },
            "colorway": list(LINES),
            "xaxis": axis,
            "yaxis": axis,
            "coloraxis": {"colorbar": _colorbar(ink)},
            "hoverlabel": {
                "font": {"family": MONO, "size": 13, "color": ink["ink"]},
                "bgcolor": ink["panel"],
                "bordercolor": ink["soft"],
                "align": "left",
                "namelength": -1,
            },
            "legend": {"bgcolor": "rgba(0,0,0,0)", "font": {"color": ink["ink"]}},
            "annotationdefaults": {"font": {"color": ink["ink"]}, "showarrow": False},
        },
        data={"table": [go.Table(**table)], "heatmap": [go.Heatmap(colorbar=_colorbar(ink))]},
    )


def _colorbar(ink: dict[str, str]) -> dict[str, Any]:
    return {
        "outlinewidth": 0,
        "ticks": "outside",
        "tickcolor": ink["soft"],
        "ticklen": 4,
        "tickfont": {"color": ink["ink"], "size": 11},
        "title": {"font": {"color": ink["soft"], "size": 13}, "side": "right"},
    }


TEMPLATES: dict[Theme, go.layout.Template] = {"light": _template("light"), "dark": _template("dark")}


def inks_of(theme: Theme) -> dict[str, str]:
    """The colours of a theme: paper, ink, soft (for what matters less), grid and panel."""
    return dict(_INKS[theme])


def current_theme() -> Theme:
    """The theme of new figures: "dark" if plotly's default template is a dark one, else "light"."""
    return "dark" if "dark" in str(pio.templates.default or "") else "light"


def with_theme(figure: go.Figure, theme: Theme) -> go.Figure:
    """Copy a figure of this package in the "light" or the "dark" theme.

    Returns:
        The copy; the figure itself stays as it is.

    Raises:
        ValueError: `theme` is neither.

    Example:
        dark = display.with_theme(display.plot_certificate(model.certificate), "dark")
    """
    if theme not in TEMPLATES:
        raise ValueError(f"theme must be 'light' or 'dark', not {theme!r}.")
    return go.Figure(figure).update_layout(template=TEMPLATES[theme])


def new_figure(title: str | None, **layout: Any) -> go.Figure:
    """An empty figure in the current theme; `title` is plain text, `layout` goes to plotly's layout."""
    figure = go.Figure(layout={"template": TEMPLATES[current_theme()], **layout})
    if title:
        figure.update_layout(title_text=escape_lines(title))
    return figure


def shown(figure: go.Figure, show: bool) -> go.Figure:
    """Return the figure with its title in lines that fit; show it first if `show`.

    Raises:
        ModuleNotFoundError: It is to be shown in a notebook, and nbformat is not installed.
    """
    _wrap_title(figure)
    if show:
        try:
            figure.show()
        except ValueError as error:
            if "nbformat" not in str(error):
                raise
            raise ModuleNotFoundError(
                "To show a figure in a notebook, plotly needs nbformat: pip install nbformat, and restart the kernel."
            ) from None
    return figure


def _wrap_title(figure: go.Figure) -> None:
    """Break a title that is wider than the figure into lines; make a narrow figure wider first, and higher by lines."""
    text, wide, margin = figure.layout.title.text, figure.layout.width, figure.layout.margin
    if not text or not wide:
        return
    plain = [html.unescape(line) for line in text.split("<br>")]
    beside = (margin.l or 0) + 12
    needed = math.ceil(max(map(len, plain)) * _TITLE * _SANS_WIDTH) + beside
    if wide < min(needed, _ROOM):
        margin.r = (margin.r or 0) + min(needed, _ROOM) - wide
        wide = figure.layout.width = min(needed, _ROOM)
    columns = max(int((wide - beside) / (_TITLE * _SANS_WIDTH)), 16)
    lines = [piece for line in plain for piece in textwrap.wrap(line, columns) or [""]]
    figure.layout.title.text = "<br>".join(escape(line) for line in lines)
    if len(lines) == 1:
        return
    # plotly puts the first of several lines higher than a single one.
    figure.layout.title.pad.t = _TOOLBAR + round(0.7 * _TITLE)
    more = round(1.3 * _TITLE) * (len(lines) - 1)
    margin.t = (margin.t or 64) + more
    if figure.layout.height:
        figure.layout.height += more
