"""Saving: whole files or none, clear errors, images through plotly's own writer."""

from __future__ import annotations

import builtins
import re
import sys

import plotly.graph_objects as go
import plotly.io as pio
import pytest
import torch

from nnterp import display
from nnterp.interventions import Result


@pytest.fixture
def figure():
    return display.plot_patching(torch.randn(3, 4), ["a", "b", "c", "<script>"])


def test_page_has_everything_in_it(figure, tmp_path):
    path = display.save(figure, tmp_path / "new" / "folder" / "figure.html")
    page = path.read_text()
    assert "plotly.js v" in page
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=[\"'](?!data:)", page.split("<body>")[0])
    assert not re.search(r"<script[^>]+src=", page)
    assert '<script>"' not in page.split("Plotly.newPlot")[-1]
    assert [p.name for p in path.parent.iterdir()] == ["figure.html"]


@pytest.mark.parametrize("name", ["figure", "figure.txt", "figure.html.zip"])
def test_unknown_kind_is_refused_and_nothing_is_made(figure, tmp_path, name):
    with pytest.raises(ValueError, match=r"must be one of \.html, \.png"):
        display.save(figure, tmp_path / "folder" / name)
    assert not (tmp_path / "folder").exists()


def test_a_result_is_drawn_before_it_is_saved(tmp_path):
    axes, labels = {"scores": ("layers",)}, {"layers": (0, 1)}
    result = Result({"scores": torch.zeros(2)}, axes, labels)
    for given, words in ((result, r"a Result: draw it first.*result\.plot\("), (torch.zeros(2), "a Tensor")):
        with pytest.raises(TypeError, match=words):
            display.save(given, tmp_path / "folder" / "figure.html")
    assert not (tmp_path / "folder").exists()


def test_failed_write_leaves_what_was_there(figure, tmp_path, monkeypatch):
    path = tmp_path / "figure.html"
    path.write_text("before")
    real = builtins.open

    def failing(file, mode="r", *args, **kwargs):
        handle = real(file, mode, *args, **kwargs)
        if "x" in mode:
            handle.write(b"half")

            class Full:
                def __enter__(self):
                    return self

                def __exit__(self, *_):
                    handle.close()

                def write(self, _):
                    raise OSError(28, "No space left on device")

            return Full()
        return handle

    monkeypatch.setattr(builtins, "open", failing)
    with pytest.raises(OSError, match="No space"):
        display.save(figure, path)
    monkeypatch.undo()
    assert path.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["figure.html"]


def test_image_without_a_writer_says_how_to_get_one(figure, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "kaleido", None)
    with pytest.raises(
        display.ImageWriterMissing, match=r"pip install 'nnterp-display\[images\]'.*\.html needs neither"
    ):
        display.save(figure, tmp_path / "figure.png")
    assert list(tmp_path.iterdir()) == []


def test_image_without_a_browser_says_so(figure, tmp_path, monkeypatch):
    pytest.importorskip("kaleido")
    from choreographer.errors import ChromeNotFoundError

    def no_browser(*args, **kwargs):
        raise ChromeNotFoundError("Chrome not found")

    monkeypatch.setattr(pio, "to_image", no_browser)
    with pytest.raises(display.ImageWriterMissing, match="plotly_get_chrome"):
        display.save(figure, tmp_path / "figure.svg")
    assert list(tmp_path.iterdir()) == []


def test_images(figure, tmp_path):
    pytest.importorskip("kaleido")
    try:
        png = display.save(figure, tmp_path / "figure.png", scale=1)
    except display.ImageWriterMissing as error:
        pytest.skip(f"images cannot be written here: {error}")
    data = png.read_bytes()
    assert data.startswith(b"\x89PNG")
    size = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    assert size == (figure.layout.width, figure.layout.height)
    svg = display.save(figure, tmp_path / "figure.svg").read_text()
    assert "&#60;script&#62;" in svg or "&lt;script" in svg
    assert "<script>" not in svg


def test_themes(figure, monkeypatch):
    dark = display.with_theme(figure, "dark")
    assert dark.layout.template.layout.paper_bgcolor != figure.layout.template.layout.paper_bgcolor
    assert figure.layout.template.layout.paper_bgcolor == "#ffffff"
    monkeypatch.setattr(pio.templates, "default", "plotly_dark")
    assert display.plot_patching(torch.ones(2, 2)).layout.template == dark.layout.template
    with pytest.raises(ValueError, match="'light' or 'dark'"):
        display.with_theme(figure, "sepia")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_and_lines_stand_out_from_the_paper(theme):
    from nnterp.display._theme import LINES, TEMPLATES

    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(one, other):
        low, high = sorted((luminance(one), luminance(other)))
        return (high + 0.05) / (low + 0.05)

    layout = TEMPLATES[theme].layout
    for ink in (layout.font.color, layout.title.font.color, layout.xaxis.title.font.color, layout.xaxis.tickfont.color):
        assert contrast(ink, layout.paper_bgcolor) >= 4.5
    assert contrast(layout.hoverlabel.font.color, layout.hoverlabel.bgcolor) >= 4.5
    for line in LINES[:4]:
        assert contrast(line, layout.paper_bgcolor) >= 2.9


def test_cell_inks_are_readable_on_every_colour():
    import numpy as np
    from plotly.colors import get_colorscale, sample_colorscale, unlabel_rgb

    from nnterp.display._cell_text import inks

    for scale in ("Cividis", "RdBu"):
        levels = np.linspace(0, 1, 101)
        for level, ink in zip(levels, inks(levels, scale), strict=True):
            rgb = unlabel_rgb(sample_colorscale(get_colorscale(scale), [level])[0])
            linear = [p / 255 / 12.92 if p / 255 <= 0.04045 else ((p / 255 + 0.055) / 1.055) ** 2.4 for p in rgb]
            paper = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
            contrast = 1.05 / (paper + 0.05) if ink == "#ffffff" else (paper + 0.05) / 0.05
            assert contrast >= 4.5


def test_show_is_only_on_request(monkeypatch):
    shown = []
    monkeypatch.setattr(go.Figure, "show", lambda self, *a, **k: shown.append(self))
    probs = torch.full((2, 4), 0.25)
    display.plot_lens(probs)
    display.plot_topk_tokens(probs, None, k=2, show=False)
    assert shown == []
    figures = [display.plot_lens(probs, show=True), display.plot_topk_tokens(probs, None, k=2)]
    assert shown == figures
