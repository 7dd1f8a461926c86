"""Every figure opened in Chromium: drawn, silent, offline, with the right words under the mouse."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nnterp import display
from nnterp.token_text import shorten

pytestmark = pytest.mark.slow

HOSTILE = [
    "<script>alert(1)</script>",
    "<b>bold</b>",
    "&lt;",
    "&amp;lt;",
    "$x^2$",
    "%{x}",
    "</script><script>window.pwned=1</script>",
    "a\nb",
    " two  spaces ",
    "<a href='http://example.invalid/'>link</a>",
    "<img src=http://example.invalid/x.png>",
    "<br>",
    "العربية",
    "\u202eoverride",
    "\x00",
]


class Words:
    """A tokenizer whose tokens are any texts at all."""

    def __init__(self, words):
        self.words = list(words)

    def convert_ids_to_tokens(self, token):
        return self.words[token]


def dense(layers, positions, vocab, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(layers, positions, vocab, generator=generator) * 2).softmax(-1)


def causal(*shape, seed=0):
    scores = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 2
    future = torch.triu(torch.ones(shape[-2:], dtype=torch.bool), 1)
    return scores.masked_fill(future, float("-inf")).softmax(-1)


def several_prompts(labels, tokens):
    """A patching result of several prompts; their tokens are texts, None past a prompt's end."""
    scores = torch.linspace(-1, 1, len(tokens) * 3 * len(labels)).view(len(tokens), 3, len(labels))
    scores[torch.tensor([[token is None for token in row] for row in tokens])[:, None].expand_as(scores)] = torch.nan
    return SimpleNamespace(
        tensors={"scores": scores},
        axes={"scores": ("prompts", "layers", "positions")},
        labels={"prompts": range(len(tokens)), "layers": range(3), "positions": labels},
        tokens=tokens,
    )


def every_figure():
    """Name → a function that draws it."""
    words = [*HOSTILE, "·", "plain"]
    tokenizer, n = Words(words), len(words)
    texts = words
    lens = dense(6, n, n)
    return {
        "lens": lambda: display.plot_lens(lens, tokenizer, tokens=texts, title="<b>title</b> & $co$", page=3000),
        "rank": lambda: display.plot_lens(lens, tokenizer, tokens=texts, color="rank"),
        "entropy": lambda: display.plot_lens(lens, tokenizer, tokens=texts, color="entropy"),
        "kl": lambda: display.plot_lens(lens, tokenizer, tokens=texts, color="kl", top_k=3, every=2, page=600),
        "log": lambda: display.plot_lens(lens, tokenizer, tokens=texts, scale="logodds", positions=range(0, n, 2)),
        "generation": lambda: display.plot_generation(lens[0].log(), range(n), tokenizer, page=700),
        "surprise": lambda: display.plot_surprise(lens[0].log(), range(n), tokenizer),
        "odds": lambda: display.plot_targets({"a": torch.rand(9, 30) ** 20, "b": torch.rand(9, 30)}, scale="logodds"),
        "ranks": lambda: display.plot_targets({"a": torch.rand(9, 30) * 40000 + 1}, value="rank"),
        "short": lambda: display.plot_lens(dense(2, 3, n), tokenizer, tokens=texts[:3], color="rank"),
        "shortest": lambda: display.plot_patching(torch.ones(1, 2), score="normalised logit difference of two names"),
        "targets": lambda: display.plot_targets(
            {word: torch.rand(9, 6) for word in words[:6]}, layers=["<i>0</i>", 1, 2, 3, 4, 5]
        ),
        "attention": lambda: display.plot_attention(causal(n, n), texts),
        "heads": lambda: display.plot_attention(causal(5, n, n), texts, heads=["<b>0</b>", 1, 2, 3, 4]),
        "wall": lambda: display.plot_attention(causal(3, 4, n, n), texts),
        "tokens": lambda: display.plot_tokens(texts, torch.linspace(-1, 1, n), name="<b>loss</b> (nats)"),
        "patching": lambda: display.plot_patching(torch.linspace(-1, 1, 6 * n).view(6, n), texts, score="<s>score</s>"),
        "selectors": lambda: display.plot_patching(
            several_prompts([f"last_of({word!r})" for word in words], [words] * 2), prompts="mean"
        ),
        "counted": lambda: display.plot_patching(
            several_prompts(range(n), [[*words[:i], *[None] * (n - i)] for i in range(3, n + 1)]), prompts="mean"
        ),
        "components": lambda: display.plot_components(torch.linspace(-1, 1, n), texts, score="<s>score</s>"),
        "patchscope": lambda: display.plot_patchscope(lens.transpose(0, 1)[:3], tokenizer, sources=words[:3]),
        "generated": lambda: display.plot_patchscope([words[:8], words[8:16]]),
        "probe": lambda: display.plot_probe(
            torch.linspace(0.5, 0.98, 30), {word: torch.rand(30, 5) * 0.2 + 0.4 for word in words[:2]}, majority=0.55
        ),
        "topk": lambda: display.plot_topk_tokens(lens.transpose(0, 1)[:4], tokenizer, show=False),
    }


@pytest.fixture(scope="module")
def figures():
    return {name: draw() for name, draw in every_figure().items()}


@pytest.mark.parametrize("name", sorted(every_figure()))
def test_page_is_drawn_silent_offline_and_exact(name, figures, browser, tmp_path):
    path = display.save(figures[name], tmp_path / f"{name}.html")
    browser.open(path)
    assert browser.errors() == []
    assert browser.requests() == [path.resolve().as_uri()]
    assert browser.js("return window.pwned") is None
    assert browser.js(MARKUP) == []
    assert len(browser.texts()) > 5
    assert browser.js(CUT) == []
    assert browser.js(OVERLAP) == []
    for selector, words in SHOWN.get(name, {}).items():
        drawn = browser.js(
            f"return [...document.querySelectorAll('.js-plotly-plot {selector}')].map(t => t.textContent)"
        )
        assert [text.strip("\u2068\u2069") for text in drawn] == words


@pytest.mark.parametrize("name", ["lens", "wall", "surprise", "patchscope"])
def test_a_small_page_draws_the_same(name, figures, browser, tmp_path):
    """A page that finds plotly.js elsewhere holds its figure compressed."""
    found = []
    for kind in ("inline", "directory"):
        path = display.save(figures[name], tmp_path / f"{kind}.html", plotlyjs=kind)
        browser.open(path)
        assert browser.errors() == []
        box = browser.js("return document.querySelector('.svg-container').getBoundingClientRect().toJSON()")
        found.append((box, browser.texts(), browser.js(CUT)))
    assert browser.requests() == [path.resolve().as_uri(), (tmp_path / "plotly.min.js").as_uri()]
    assert found[0] == found[1]
    assert len(found[0][1]) > 5
    if name == "wall":
        under = [browser.hover(x, 10, "xy") for x in (3, 5)]
        browser.open(tmp_path / "inline.html")
        assert [browser.hover(x, 10, "xy") for x in (3, 5)] == under


LABELS = [shorten(display.visible(word), 18) for word in [*HOSTILE, "·", "plain"]]
FULL = [shorten(display.visible(word), 40) for word in [*HOSTILE, "·", "plain"]]
# What has to be read in some of the figures, to the letter.
SHOWN = {
    "lens": {".xtick text": LABELS, ".gtitle": ["<b>title</b> & $co$"]},
    "attention": {".xtick text": LABELS, ".ytick text": LABELS},
    "patching": {".xtick text": LABELS, ".cbtitle text, .colorbar text[class*=title]": ["<s>score</s>"]},
    "tokens": {".bartext": FULL},
    "heads": {".annotation-text": ["head <b>0</b>", "head 1", "head 2", "head 3", "head 4"]},
    "targets": {".legendtext": FULL[:6]},
}


# Whatever in a label came of markup: links, images, bold or slanted letters, formulas.
MARKUP = """
    const found = 'a[href*=example], image[href*=example], tspan[style*=bold], tspan[style*=italic], .math-group';
    const plot = document.querySelector('.js-plotly-plot');
    return [...plot.querySelectorAll(found)].map(e => e.outerHTML);
"""
# Texts that stick out of the figure, by more than the pixel that rounding makes.
CUT = """
    const plot = document.querySelector('.js-plotly-plot .svg-container').getBoundingClientRect();
    return [...document.querySelectorAll('.js-plotly-plot text')].filter(t => {
      const b = t.getBoundingClientRect();
      return b.width && (b.left < plot.left - 1 || b.right > plot.right + 1
                         || b.top < plot.top - 1 || b.bottom > plot.bottom + 1);
    }).map(t => t.textContent).concat([...document.querySelectorAll('.js-plotly-plot .cell-rect')].filter(
      r => r.getBoundingClientRect().bottom > plot.bottom).map(_ => 'a row of the table'));
"""
# Pairs of texts that lie on each other, labels and cells alike.
OVERLAP = """
    const boxes = [...document.querySelectorAll('.js-plotly-plot text')]
      .filter(t => t.textContent.trim() && !t.closest('.hoverlayer') && !t.closest('.modebar'))
      .filter(t => getComputedStyle(t).visibility !== 'hidden')
      .map(t => [t.textContent, t.getBoundingClientRect()]).filter(([_, b]) => b.width > 0);
    boxes.sort((p, q) => p[1].left - q[1].left);
    const found = [];
    for (let i = 0; i < boxes.length && found.length < 5; i++)
      for (let j = i + 1; j < boxes.length && boxes[j][1].left < boxes[i][1].right - 1.5; j++) {
        const [a, b] = [boxes[i][1], boxes[j][1]];
        if (Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 3) found.push([boxes[i][0], boxes[j][0]]);
      }
    return found;
"""


@pytest.mark.parametrize(("layers", "positions"), [(12, 20), (80, 60)])
def test_large_grids_have_no_overlap_and_no_cut_label(layers, positions, browser, tmp_path):
    from nnterp.testing import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    ids = (tokenizer("The capital of France is Paris, and the Eiffel Tower is in the city of Rome; " * 4)["input_ids"])[
        :positions
    ]
    lens = dense(layers, positions, 509)
    drawn = {
        "lens": display.plot_lens(lens, tokenizer, tokens=ids, title="Logit lens"),
        "patching": display.plot_patching(torch.randn(layers, positions), ids, tokenizer, score="logit difference"),
        "attention": display.plot_attention(causal(positions, positions), ids, tokenizer),
        "heads": display.plot_attention(causal(12, positions, positions), ids, tokenizer),
        "wall": display.plot_attention(causal(min(layers, 12), 6, positions, positions), ids, tokenizer),
        "tokens": display.plot_tokens(ids, torch.randn(positions), tokenizer),
        "targets": display.plot_targets({"target": torch.rand(40, layers), "other": torch.rand(40, layers)}),
        "patchscope": display.plot_patchscope(
            lens.transpose(0, 1)[:5], tokenizer, sources=["The capital of France is a city"] * 5
        ),
        "topk": display.plot_topk_tokens(lens.transpose(0, 1)[:5], tokenizer, show=False),
    }
    browser.open(display.save(drawn.pop("lens"), tmp_path / "lens.html"))
    for name, figure in {"lens": None, **drawn}.items():
        if figure is not None:
            browser.draw(figure)
        assert browser.errors() == [], name
        assert browser.js(CUT) == [], name
        assert browser.js(OVERLAP) == [], name


def test_hover_on_the_lens_shows_token_and_probability(figures, browser, tmp_path):
    words = [*HOSTILE, "·", "plain"]
    lens = dense(6, len(words), len(words)).double().numpy()
    browser.open(display.save(figures["lens"], tmp_path / "lens.html"))
    for layer, position in ((0, 0), (3, 7), (5, 16)):
        lines = browser.hover(position, layer).split("\n")
        best = np.argsort(-lens[layer, position])[:5]
        assert (
            lines[0].strip("\u2068\u2069") == f"layer {layer}, position {position}  {display.visible(words[position])}"
        )
        for line, token in zip(lines[1:], best, strict=True):
            shown = line.replace("\u2068", "").replace("\u2069", "")
            assert display.visible(words[token])[:30] in shown
            assert shown.endswith(f"{lens[layer, position, token]:.4f}")


def test_hover_on_the_other_figures(figures, browser, tmp_path):
    words = [*HOSTILE, "·", "plain"]
    n = len(words)
    browser.open(display.save(figures["attention"], tmp_path / "attention.html"))
    assert browser.hover(1, 4) == f"query 4  $x^2$\nkey 1  <b>bold</b>\n{causal(n, n)[4, 1]:.4f}"
    browser.open(display.save(figures["patching"], tmp_path / "patching.html"))
    value = torch.linspace(-1, 1, 6 * n).view(6, n)[2, 5]
    assert browser.hover(5, 2) == f"layer 2\nposition 5  %{{x}}\n<s>score</s> {value:.4f}"
    browser.open(display.save(figures["wall"], tmp_path / "wall.html"))
    spot = figures["wall"].layout.xaxis.tickvals, figures["wall"].layout.yaxis.tickvals
    x, y = spot[0][2] - (n - 1) / 2 + 1, spot[1][1] - (n - 1) / 2 + 4
    assert (
        browser.hover(x, y)
        == f"layer 1, query 4  $x^2$\nhead 2, key 1  <b>bold</b>\n{causal(3, 4, n, n)[1, 2, 4, 1]:.4f}"
    )
    browser.open(display.save(figures["heads"], tmp_path / "heads.html"))
    tile = figures["heads"].data[4]
    x, y = (list(getattr(figures["heads"].layout, axis).categoryarray) for axis in ("xaxis", "yaxis"))
    assert (
        browser.hover(x.index(tile.x[1]), y.index(tile.y[4]))
        == f"head 4\nquery 4  $x^2$\nkey 1  <b>bold</b>\n{causal(5, n, n)[4, 4, 1]:.4f}"
    )
    browser.open(display.save(figures["tokens"], tmp_path / "tokens.html"))
    bar = figures["tokens"].data[0]
    text = browser.hover(bar.base[1] + bar.x[1] / 2, bar.y[1])
    assert text == f"position 1  <b>bold</b>\n<b>loss</b> (nats) {torch.linspace(-1, 1, n)[1]:.4f}"


def test_page_follows_the_readers_theme(figures, browser, tmp_path):
    path = display.save(figures["lens"], tmp_path / "lens.html")
    papers = {}
    for theme in ("light", "dark"):
        feature = {"name": "prefers-color-scheme", "value": theme}
        browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        browser.open(path)
        papers[theme] = browser.js("return document.querySelector('.main-svg').style.background")
        assert browser.errors() == []
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert papers == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 28)"}
    fixed = display.save(figures["lens"], tmp_path / "fixed.html", theme="dark")
    browser.open(fixed)
    assert browser.js("return document.querySelector('.main-svg').style.background") == "rgb(20, 23, 28)"


def test_hostile_texts_cannot_leave_the_script_they_are_stored_in(figures):
    from nnterp.display._save import page

    for figure in figures.values():
        assert "window.pwned" not in page(figure).replace("\\u003c", "<") or "</script><script>window" not in page(
            figure
        )
        assert json.loads(figure.to_json())


def test_figures_of_the_toy_checkpoints_results(toy, browser, tmp_path):
    from nnterp.interventions import (
        ablate,
        activation_patching,
        components,
        logit_difference,
        logit_lens,
        logit_lens_table,
        patchscope_table,
    )
    from nnterp.prompts import Prompt, run_prompts

    text = "The capital of France is"
    lens = logit_lens_table(toy, text, progress=False)
    prompts = [
        Prompt.from_strings(f"The capital of {country} is", {"capital": city}, toy)
        for country, city in {"France": "Paris", "Italy": "Rome", "Japan": "Tokyo"}.items()
    ]
    clean = "When Mary and John went to the store, John gave a drink to"
    corrupted = clean.replace(", John", ", Mary")
    patched = activation_patching(toy, clean, corrupted, logit_difference(" Mary", " John"), progress=False)
    targets = run_prompts(toy, prompts, get_probs_func=logit_lens, tqdm=None)
    figures = {
        "targets": targets.plot(),
        "patching": patched.normalized().plot(tokenizer=toy.tokenizer),
        "ablation": ablate(toy, clean, components(toy, "attention_head_outputs", heads="all"), progress=False).plot(),
        "bars": ablate(toy, clean, components(toy, "mlps_output", positions=-1), progress=False).plot(),
        "patchscope": patchscope_table(toy, ["The capital of France"], progress=False).plot(tokenizer=toy.tokenizer),
        "certificate": display.plot_certificate(toy.certificate),
        "topk": display.plot_topk_tokens(logit_lens(toy, text, progress=False), toy.tokenizer, show=False),
    }
    path = display.save(lens.plot(tokenizer=toy.tokenizer), tmp_path / "lens.html")
    browser.open(path)
    assert browser.errors() == []
    assert browser.requests() == [path.resolve().as_uri()]
    last = toy.num_layers - 1, lens["top_ids"].shape[2] - 1
    share = lens["top_probs"][0, last[0], last[1], 0].item()
    lines = browser.hover(last[1], last[0]).split("\n")
    assert lines[0] == f"layer {last[0]}, position {last[1]}  ·is"
    assert lines[1].split() == ["1.", "·Paris", f"{share:.4f}"]
    for name, figure in figures.items():
        browser.draw(figure)
        assert browser.errors() == [], name
        assert browser.requests() == [], name
        assert browser.js(CUT) == [], name
        assert browser.js(OVERLAP) == [], name
        if name == "patching":
            column = list(figure.layout.xaxis.ticktext).index("·drink")
            score = patched.normalized()["scores"][0, 3, column].item()
            assert browser.hover(column, 3).split("\n")[1:][0] == f"position {column}  ·drink"
            assert f"{score:.4f}" in browser.hover(column, 3) or abs(score) < 0.001
        if name == "targets":
            value = targets["capital"][:, 5].median().item()
            assert f"layer 5: {value:.4f}" in browser.hover(5, value)


def test_the_checks_above_see_what_they_look_for(figures, browser, tmp_path):
    import plotly.graph_objects as go

    browser.open(display.save(go.Figure(figures["patchscope"]).update_layout(height=200), tmp_path / "cut.html"))
    assert "a row of the table" in browser.js(CUT)
    narrow = go.Figure(figures["lens"]).update_layout(width=500, margin={"l": 10, "r": 10})
    browser.draw(narrow.update_xaxes(tickangle=0, automargin=False))
    assert browser.js(OVERLAP)
    browser.draw(go.Figure(figures["lens"]).update_layout(margin={"l": 0}).update_yaxes(automargin=False))
    assert "5" in browser.js(CUT)
    bold = go.Figure(figures["lens"]).update_layout(title_text="<b>bold</b>")
    browser.draw(bold)
    assert browser.js(MARKUP)
