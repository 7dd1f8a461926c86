"""Write a figure to a file: a page that opens offline, or an image."""

from __future__ import annotations

import html
import re
from pathlib import Path

import plotly.graph_objects as go
import plotly.io as pio

from nnterp.display._theme import TEMPLATES, Theme, with_theme
from nnterp.files import write_whole

IMAGES = ("png", "svg", "pdf", "jpg", "jpeg", "webp")
PAGES = ("html", "htm")


class ImageWriterMissing(RuntimeError):
    """Raised for an image if kaleido, or the browser that it drives, is not installed or does not start."""


def save(
    figure: go.Figure, path: str | Path, *, theme: Theme | None = None, scale: float = 2.0, title: str | None = None
) -> Path:
    """Write a figure to a file; the suffix of the path says which kind of file.

    * `.html`: one page with plotly.js in it, which opens offline and loads nothing. It follows the reader's light or
      dark setting unless `theme` is given.
    * `.png`, `.svg`, `.pdf`, `.jpg`, `.webp`: an image, which kaleido and a Chrome or Chromium make.

    Missing directories are made. If writing fails, the file that was there before stays as it was.

    Args:
        figure: Any plotly figure.
        path: The file to write.
        theme: "light" or "dark"; the figure's own if None.
        scale: Pixels of an image per pixel of the figure.
        title: The page's title; the figure's if None.

    Returns:
        The path written.

    Raises:
        ValueError: The path's suffix is none of these.
        ImageWriterMissing: There is no image writer; the message says how to install one. `.html` needs none.
        OSError: The directory or the file cannot be written.
    """
    path = Path(path)
    kind = path.suffix.lower().removeprefix(".")
    if kind not in (*PAGES, *IMAGES):
        known = ", ".join(f".{name}" for name in ("html", *IMAGES))
        raise ValueError(f"Cannot tell from {path.name!r} what to write: its suffix must be one of {known}.")
    if theme is not None:
        figure = with_theme(figure, theme)
    if kind in PAGES:
        content = page(figure, title, follow_reader=theme is None).encode()
    else:
        content = _image(figure, kind, scale)
    write_whole(path, content)
    return path


def page(figure: go.Figure, title: str | None = None, *, follow_reader: bool = True) -> str:
    """An HTML page with the figure and plotly.js in it.

    Args:
        figure: Any plotly figure.
        title: The page's title; the figure's if None.
        follow_reader: Show figures of this package in the reader's light or dark setting.
    """
    if title is None:
        title = re.sub(r"<br\s*/?>.*", "", figure.layout.title.text or "", flags=re.DOTALL)
        title = html.unescape(re.sub(r"<[^>]*>", "", title)) or "nnterp"
    body = pio.to_html(
        figure,
        include_plotlyjs=True,
        include_mathjax=False,
        full_html=False,
        default_width="100%",
        default_height="100%",
        config={"displaylogo": False, "showTips": False},
        div_id="figure",
        post_script=_follow_reader() if follow_reader and _is_ours(figure) else None,
    )
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
