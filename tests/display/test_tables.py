"""How a model and its certificate show themselves in notebooks and terminals."""

from __future__ import annotations

import html
import io
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from rich.console import Console


class Texts(HTMLParser):
    def __init__(self, source):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture(scope="module")
def model():
    from nnterp import StandardizedTransformer
    from nnterp.testing import tiny_model, tiny_tokenizer

    return StandardizedTransformer(tiny_model("llama"), tokenizer=tiny_tokenizer())


def printed(thing, width=160):
    console = Console(file=io.StringIO(), width=width)
    console.print(thing)
    return console.file.getvalue()


def test_certificate_in_a_notebook_and_a_terminal(model):
    certificate = model.certificate
    seen = Texts(certificate._repr_html_())
    text = printed(certificate)
    for row in certificate.rows():
        for cell in filter(None, row):
            assert cell in seen.texts
            assert cell.split()[0] in text
    assert certificate.verdict in seen.texts
    assert certificate.verdict in text
    assert str(certificate).startswith(certificate.verdict)


def test_texts_are_no_markup(model):
    hostile = "<img src=x onerror=alert(1)> [red]x[/red] &lt;"
    line = replace(model.certificate.lines[0], name=hostile)
    certificate = replace(model.certificate, model=hostile, lines=(line,))
    seen = Texts(certificate._repr_html_())
    assert "img" not in seen.tags
    assert hostile in seen.texts
    assert hostile in printed(certificate)
    anatomy = replace(model.anatomy, model_class=hostile)
    assert "img" not in Texts(anatomy._repr_html_()).tags
    assert hostile in printed(anatomy)


def test_model_in_a_notebook_and_a_terminal(model):
    seen = Texts(model._repr_html_())
    text = printed(model)
    for name, native in model.anatomy.rows():
        assert name in seen.texts
        assert native in seen.texts
        assert native in text
    assert model.certificate.verdict in "".join(seen.texts)


def test_ipython_uses_them(model):
    formatters = pytest.importorskip("IPython.core.formatters")
    formatted = formatters.DisplayFormatter().format(model)[0]
    assert html.escape("model.layers.*.self_attn") in formatted["text/html"]
