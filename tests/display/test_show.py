"""Showing a figure where plotly lacks what it needs says in one sentence what to install."""

from __future__ import annotations

import plotly.io as pio
import plotly.io._renderers as renderers
import pytest

from nnterp import display


@pytest.fixture
def notebook(monkeypatch):
    """Figures are shown as in a notebook; IPython itself may be absent."""
    monkeypatch.setattr(renderers, "ipython_display", object())
    before = pio.renderers.default
    pio.renderers.default = "plotly_mimetype"
    yield monkeypatch
    pio.renderers.default = before


def test_a_notebook_without_nbformat_says_what_to_install(notebook):
    notebook.setattr(renderers, "nbformat", None)
    with pytest.raises(ModuleNotFoundError) as caught:
        display.plot_heads([[0.1, 0.9]], show=True)
    assert str(caught.value) == (
        "To show a figure in a notebook, plotly needs nbformat: pip install nbformat, and restart the kernel."
    )


def test_another_error_of_plotly_is_left_as_it_is(notebook):
    notebook.setattr(renderers, "ipython_display", None)
    with pytest.raises(ValueError, match="ipython"):
        display.plot_heads([[0.1, 0.9]], show=True)
