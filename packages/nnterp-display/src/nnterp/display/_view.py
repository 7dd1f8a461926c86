"""Views: interactive pages for what a plotly figure cannot do, such as picking a head over a text."""

from __future__ import annotations

import html
import json
import math
import tempfile
import webbrowser
import zlib
from base64 import b64encode
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import numpy as np
from plotly.offline import get_plotlyjs, get_plotlyjs_version

from nnterp.display._theme import Theme, inks_of

PlotlyJs = Literal["inline", "directory", "cdn"]
"""Where a page finds plotly.js: in itself, in a file beside it, or on the web."""


@dataclass(frozen=True)
class View:
    """An interactive page; `plot_attention_text` and `side_by_side` return one.

    A notebook shows it below the cell, `view.show()` elsewhere, and `nnterp.display.save(view, "page.html")` writes it.
    The page opens offline and follows the reader's light or dark setting.

    Attributes:
        title: The heading, plain text.
        script: File name of the JavaScript that draws the page, in `_pages`.
        data: What the script draws: values that JSON can hold.
        needs_plotly: Whether the page draws plotly figures.
        height: Height of the frame in a notebook, in pixels.

    Example:
        >>> import torch
        >>> from nnterp import display
        >>> view = display.plot_attention_text(torch.eye(2), ["a", "b"])
        >>> view.page().startswith("<!doctype html>")
        True
    """

    title: str
    script: str
    data: dict[str, Any] = field(repr=False)
    needs_plotly: bool = False
    height: int = 520

    def page(self, title: str | None = None, *, theme: Theme | None = None, plotlyjs: PlotlyJs = "inline") -> str:
        """Write the page as HTML.

        Args:
            title: The title of the page; that of the view if None.
            theme: "light" or "dark"; the reader's setting if None.
            plotlyjs: Where the page finds plotly.js, if it needs it: "inline", "directory" or "cdn", as in
                `nnterp.display.save`.

        Returns:
            The whole page, as text.

        Raises:
            ValueError: `theme` is none of these.
        """
        if theme not in (None, "light", "dark"):
            raise ValueError(f"theme must be 'light' or 'dark', not {theme!r}.")
        shown = {**self.data, "theme": theme}
        if theme is not None and "templates" in shown:
            shown["templates"] = dict.fromkeys(("light", "dark"), self.data["templates"][theme])
        stored = json.dumps(shown, ensure_ascii=True, allow_nan=False).replace("<", "\\u003c")
        script = f"{_resource('common.js')}{_resource(self.script)}"
        kind, start = "application/json", f"const data = JSON.parse({_STORED});\n{script}"
        if plotlyjs != "inline":
            kind, stored = "text/plain", squeezed(stored)
            start = f"{UNSQUEEZE}unsqueezed({_STORED}).then((data) => {{\n{script}\n}});"
        heading = f"<h1>{html.escape(self.title)}</h1>" if self.title else ""
        return (
            "<!doctype html>\n"
            '<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f'<link rel="icon" href="data:,"><title>{html.escape(title or self.title or "nnterp")}</title>'
            f"<style>{_colours(theme)}{_resource('page.css')}</style>{self._library(plotlyjs)}</head>\n"
            f'<body>{heading}<div id="view"></div>'
            f'<script type="{kind}" id="data">{stored}</script>'
            f"<script>{start}</script></body></html>\n"
        )

    def _library(self, plotlyjs: PlotlyJs) -> str:
        if not self.needs_plotly:
            return ""
        if plotlyjs == "inline":
            return f"<script>{get_plotlyjs()}</script>"
        source = "plotly.min.js" if plotlyjs == "directory" else _CDN.format(get_plotlyjs_version())
        return f'<script charset="utf-8" src="{source}"></script>'

    def show(self) -> None:
        """Show the view: in a notebook below the cell, else in a browser."""
        try:
            from IPython import get_ipython
            from IPython.display import display

            if get_ipython() is not None:
                display(self)
                return
        except ImportError:
            pass
        path = Path(tempfile.mkdtemp(prefix="nnterp-")) / "view.html"
        path.write_text(self.page(), encoding="utf-8")
        webbrowser.open(path.as_uri())

    def _repr_html_(self) -> str:
        page = html.escape(self.page(), quote=True)
        return f'<iframe srcdoc="{page}" style="width:100%;height:{self.height}px;border:0"></iframe>'


_STORED = "document.getElementById('data').textContent"
_CDN = "https://cdn.plot.ly/plotly-{}.min.js"


def _resource(name: str) -> str:
    return files("nnterp.display").joinpath("_pages", name).read_text(encoding="utf-8")


def _colours(theme: Theme | None) -> str:
    def rule(name: Theme) -> str:
        return ":root{" + "".join(f"--{key}:{value};" for key, value in inks_of(name).items()) + "}"

    if theme is not None:
        return rule(theme) + f":root{{color-scheme:{theme}}}"
    dark = rule("dark")
    return f":root{{color-scheme:light dark}}{rule('light')}@media (prefers-color-scheme: dark){{{dark}}}"


def as_written(numbers: np.ndarray) -> list[float | str | None]:
    """Numbers for a page as `write` of `common.js` shows them: three decimals, or two digits below 0.001.

    Returns:
        The numbers in their order; None for NaN, and "Infinity" or "-Infinity", for which JSON has no numbers. As text
        they take no more room than float32 in base64, and less if the page is compressed.
    """
    exact = np.asarray(numbers, dtype=float).ravel()
    small = (np.abs(exact) < 0.001) & (exact != 0)
    rounded = np.round(exact, 3)
    shift = 10.0 ** (1 - np.floor(np.log10(np.abs(exact[small]))))
    rounded[small] = np.round(exact[small] * shift) / shift  # dividing gives the number that is written with two digits
    return [None if math.isnan(value) else _INFINITE.get(value, value) for value in rounded.tolist()]


_INFINITE = {math.inf: "Infinity", -math.inf: "-Infinity"}  # as JavaScript reads them

# What a page holds that finds plotly.js elsewhere; browsers of 2023 and later can read it.
UNSQUEEZE = """
const unsqueezed = (text) => {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream('deflate'))).json();
};
if (!window.DecompressionStream) document.body.append('This page needs a browser of 2023 or later.');
"""


def squeezed(text: str) -> str:
    """A text for a page, compressed; `unsqueezed` of its script reads it."""
    return b64encode(zlib.compress(text.encode(), 6)).decode()
