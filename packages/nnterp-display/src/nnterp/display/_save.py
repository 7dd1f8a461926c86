"""Write a figure to a file: a page that opens offline, or an image."""

from __future__ import annotations

import html
import json
import math
import re
from pathlib import Path
from typing import get_args

import numpy as np
import plotly.graph_objects as go
import plotly.io as pio
from plotly.basedatatypes import BaseFigure
from plotly.offline import get_plotlyjs

from nnterp.display._theme import TEMPLATES, Theme, with_theme
from nnterp.display._view import UNSQUEEZE, PlotlyJs, View, squeezed
from nnterp.errors import NnterpError
from nnterp.files import write_whole

IMAGES = ("png", "svg", "pdf", "jpg", "jpeg", "webp")
PAGES = ("html", "htm")


class ImageWriterMissing(NnterpError, RuntimeError):
    """Raised for an image if kaleido, or the browser that it drives, is not installed or does not start.

    Example:
        figure = display.plot_certificate(model.certificate)
        try:
            display.save(figure, "certificate.png")
        except display.ImageWriterMissing:
            display.save(figure, "certificate.html")
    """


def save(
    figure: go.Figure | View,
    path: str | Path,
    *,
    theme: Theme | None = None,
    scale: float = 2.0,
    title: str | None = None,
    plotlyjs: PlotlyJs = "inline",
) -> Path:
    """Write a figure to a file; the suffix of the path says which kind of file.

    * `.html`: one page with plotly.js in it, which opens offline and loads nothing. It follows the reader's light or
      dark setting unless `theme` is given.
    * `.png`, `.svg`, `.pdf`, `.jpg`, `.webp`: an image, which kaleido and a Chrome or Chromium make.

    Missing directories are made. If writing fails, the file that was there before stays as it was.

    Args:
        figure: Any plotly figure, or a `View`.
        path: The file to write.
        theme: "light" or "dark"; the figure's own if None.
        scale: Pixels of an image per pixel of the figure.
        title: The page's title; the figure's if None.
        plotlyjs: Where a page finds plotly.js, which takes 4.5 MB. "inline": in itself. "directory": in the file
            `plotly.min.js` beside it, which is written if it is not there. "cdn": on the web, so that the page does not
            open offline. With these two the page is small: what it draws is compressed, for browsers of 2023 and later.
            A `View` that holds no plotly figure needs none.

    Returns:
        The path written.

    Raises:
        TypeError: `figure` is neither a figure nor a `View`, but a result, for example, whose `plot()` makes one.
        ValueError: The path's suffix is none of these, a `View` is to become an image, or there is no such `plotlyjs`.
        ImageWriterMissing: There is no image writer; the message says how to install one. `.html` needs none.
        OSError: The directory or the file cannot be written.

    Example:
        figure = display.plot_certificate(model.certificate)
        print(display.save(figure, "certificate.html").name)  # → certificate.html
    """
    if not isinstance(figure, (BaseFigure, View)):
        how = (
            "draw it first, and save what that returns: result.plot(...)"
            if hasattr(figure, "plot")
            else "draw it first"
        )
        raise TypeError(f"display.save() writes a figure, and was given a {type(figure).__name__}: {how}.")
    path = Path(path)
    kind = path.suffix.lower().removeprefix(".")
    if kind not in (*PAGES, *IMAGES):
        known = ", ".join(f".{name}" for name in ("html", *IMAGES))
        raise ValueError(f"Cannot tell from {path.name!r} what to write: its suffix must be one of {known}.")
    if plotlyjs not in get_args(PlotlyJs):
        raise ValueError(f"plotlyjs must be 'inline', 'directory' or 'cdn', not {plotlyjs!r}.")
    if isinstance(figure, View):
        if kind not in PAGES:
            raise ValueError(
                f"This view is a page that answers to the mouse, so it cannot become a .{kind}: use .html."
            )
        _write_library(path, plotlyjs, figure.needs_plotly)
        write_whole(path, figure.page(title, theme=theme, plotlyjs=plotlyjs).encode())
        return path
    if theme is not None:
        figure = with_theme(figure, theme)
    if kind in PAGES:
        _write_library(path, plotlyjs, True)
        content = page(figure, title, follow_reader=theme is None, plotlyjs=plotlyjs).encode()
    else:
        content = _image(figure, kind, scale)
    write_whole(path, content)
    return path


def _write_library(path: Path, plotlyjs: PlotlyJs, needed: bool) -> None:
    """Write plotly.js beside the page if the page looks for it there and it is absent or of another version."""
    if plotlyjs != "directory" or not needed:
        return
    library, script = path.parent / "plotly.min.js", get_plotlyjs().encode()
    if not library.is_file() or library.read_bytes() != script:
        write_whole(library, script)


def page(
    figure: go.Figure, title: str | None = None, *, follow_reader: bool = True, plotlyjs: PlotlyJs = "inline"
) -> str:
    """An HTML page with the figure, and with plotly.js in it or a reference to it.

    Args:
        figure: Any plotly figure.
        title: The page's title; the figure's if None.
        follow_reader: Show figures of this package in the reader's light or dark setting.
        plotlyjs: As in `save`.
    """
    if title is None:
        title = re.sub(r"<br\s*/?>", " ", figure.layout.title.text or "")
        title = html.unescape(re.sub(r"<[^>]*>", "", title)) or "nnterp"
    scripts = ([_follow_reader()] if follow_reader and _is_ours(figure) else []) + [_SHRINK]
    body = _body(figure, scripts) if plotlyjs == "inline" else _small_body(figure, scripts, plotlyjs)
    light, dark = (TEMPLATES[name].layout.paper_bgcolor for name in ("light", "dark"))
    paper = figure.layout.paper_bgcolor or figure.layout.template.layout.paper_bgcolor or "#ffffff"
    style = f"body{{margin:16px;background:{paper}}}"
    if follow_reader and _is_ours(figure):
        style = (
            f":root{{color-scheme:light dark}}body{{margin:16px;background:{light}}}"
            f"@media (prefers-color-scheme: dark){{body{{background:{dark}}}}}"
        )
    return (
        "<!doctype html>\n"
        '<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{html.escape(title)}</title><style>{style}</style></head>\n'
        f"<body>{body}</body></html>\n"
    )


_CONFIG = {"displaylogo": False, "showTips": False}


def _body(figure: go.Figure, scripts: list[str], plotlyjs: PlotlyJs = "inline") -> str:
    return pio.to_html(
        figure,
        include_plotlyjs=True if plotlyjs == "inline" else plotlyjs,
        include_mathjax=False,
        full_html=False,
        default_width="100%",
        default_height="100%",
        config=_CONFIG,
        div_id="figure",
        post_script=scripts,
    )


def _small_body(figure: go.Figure, scripts: list[str], plotlyjs: PlotlyJs) -> str:
    """The figure compressed, and where plotly.js is, as plotly writes it: with a checksum, if it comes from the web."""
    library = re.search(r"<script[^>]* src=.*?</script>", _body(go.Figure(), [], plotlyjs))
    assert library is not None
    size = ["100%" if pixels is None else f"{pixels}px" for pixels in (figure.layout.height, figure.layout.width)]
    after = "".join(script.replace("{plot_id}", "figure") for script in scripts)
    return (
        f'<div>{library[0]}<div id="figure" style="height:{size[0]};width:{size[1]}"></div><script>{UNSQUEEZE}'
        f"unsqueezed('{squeezed(pio.to_json(_as_seen(figure), validate=False))}').then((drawn) => "
        f"Plotly.newPlot('figure', drawn.data, drawn.layout, {json.dumps(_CONFIG)})"
        f"{_FRAMES if figure.frames else ''}).then(() => {{{after}}});"
        "</script></div>"
    )


_FRAMES = ".then(() => Plotly.addFrames('figure', drawn.frames)).then(() => Plotly.animate('figure', null))"


def _as_seen(figure: go.Figure) -> go.Figure:
    """The figure with the numbers of heat maps rounded to what hovering shows of them, and not coarser than colours."""
    seen = go.Figure(figure)
    for heat in seen.select_traces({"type": "heatmap"}):
        if decimals := re.search(r"%{z:[.](\d)f}", heat.hovertemplate or ""):
            exact = np.asarray(heat.z, dtype=float)
            largest = np.nanmax(np.abs(exact), initial=0.0, where=np.isfinite(exact))
            finest = 3 - math.floor(math.log10(largest)) if largest > 0 else 0  # a thousandth of the largest
            rounded = np.round(exact, max(int(decimals[1]), finest))
            heat.z = [[None if value != value else value for value in row] for row in rounded.tolist()]
    return seen


_SHRINK = """
const shrink = () => {
  const plot = document.getElementById('{plot_id}'), drawn = plot.querySelector('.svg-container');
  if (!drawn) return;
  const scale = Math.min(1, (document.documentElement.clientWidth - 32) / drawn.offsetWidth);
  plot.style.transformOrigin = '0 0';
  plot.style.transform = scale < 1 ? `scale(${scale})` : '';
  plot.style.width = scale < 1 ? `${drawn.offsetWidth}px` : '100%';
  plot.parentElement.style.height = scale < 1 ? `${drawn.offsetHeight * scale}px` : '';
  plot.parentElement.style.overflow = scale < 1 ? 'hidden' : '';
};
shrink(); window.addEventListener('resize', shrink);
document.getElementById('{plot_id}').on('plotly_afterplot', shrink);
"""


def _is_ours(figure: go.Figure) -> bool:
    """True if the figure has a template of this package."""
    return any(figure.layout.template == template for template in TEMPLATES.values())


def _follow_reader() -> str:
    """A script that draws the figure in the reader's light or dark setting, and again when the setting changes."""
    templates = {name: template.to_plotly_json() for name, template in TEMPLATES.items()}
    return (
        f"const templates = {pio.json.to_json_plotly(templates)};"
        "const dark = window.matchMedia('(prefers-color-scheme: dark)');"
        "const dress = () => Plotly.relayout('{plot_id}', {template: templates[dark.matches ? 'dark' : 'light']});"
        "dress(); dark.addEventListener('change', dress);"
    )


def _image(figure: go.Figure, kind: str, scale: float) -> bytes:
    cure = (
        "Images are written by kaleido, which drives a Chrome or Chromium: pip install 'nnterp-display[images]', and "
        "`plotly_get_chrome` if no browser is installed. Saving as .html needs neither."
    )
    try:
        import kaleido  # noqa: F401
    except ImportError as error:
        raise ImageWriterMissing(f"Cannot write a .{kind} image: kaleido is not installed. {cure}") from error
    try:
        return pio.to_image(figure, format=kind, scale=scale)
    except Exception as error:
        said = f"{type(error).__name__} {error}".lower()
        if "chrome" not in said and "browser" not in said:
            raise
        raise ImageWriterMissing(f"Cannot write a .{kind} image: {error} {cure}") from error
