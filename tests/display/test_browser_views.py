"""Views in Chromium, at the widths of a phone and of a screen, in both themes: drawn, silent, offline, and right."""

from __future__ import annotations

import pytest
import torch

from nnterp import display
from tests.display.test_browser import HOSTILE, OVERLAP, causal, dense

pytestmark = pytest.mark.slow

INK = """
    const linear = (part) => (part <= 10.3 ? part / 255 / 12.92 : ((part / 255 + 0.055) / 1.055) ** 2.4);
    const light = (colour) => {
      const [r, g, b] = colour.match(/[\\d.]+/g).map(Number).map(linear);
      return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    return [...document.querySelectorAll('.token')].map((box) => {
      const style = getComputedStyle(box), pair = [light(style.color), light(style.backgroundColor)];
      return (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
    });
"""
NUMBERS = "return [...document.querySelectorAll('.token small')].map(box => box.textContent)"


@pytest.fixture
def opened(browser, tmp_path):
    """`opened(view, width, theme)`: the view's page in a window of that width; the window is as it was afterwards."""

    def open_page(view, width=1400, theme="light", ready=".token, .js-plotly-plot .main-svg", plotlyjs="inline"):
        feature = {"name": "prefers-color-scheme", "value": theme}
        browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        window = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        browser.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", window)
        path = display.save(view, tmp_path / "view.html", plotlyjs=plotlyjs)
        browser.errors()
        browser.requests()
        browser.driver.get(path.resolve().as_uri())
        browser.driver.execute_async_script(
            """
            const [ready, done] = arguments;
            const wait = () => document.querySelector(ready) ? requestAnimationFrame(() => setTimeout(done, 150))
                                                             : setTimeout(wait, 50);
            wait();
            """,
            ready,
        )
        return path

    yield open_page
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    browser.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [700, 1400])
def test_views_are_drawn_silent_offline_and_whole(width, theme, browser, opened):
    n = len(HOSTILE)
    lens = dense(6, n, n)
    views = [
        display.plot_attention_text(
            causal(30, 9, n, n), HOSTILE, heads=["<b>0</b>", *range(1, 9)], title="<b>bold</b>"
        ),
        display.plot_activations(HOSTILE, torch.linspace(-2, 3, 3 * n).view(n, 3), units=["<i>a</i>", "b", "c"]),
        display.side_by_side(*(display.plot_lens(lens, tokens=HOSTILE, color=kind) for kind in ("entropy", "kl"))),
    ]
    for view in views:
        path = opened(view, width, theme)
        assert browser.errors() == []
        assert browser.requests() == [path.resolve().as_uri()]
        assert browser.js("return window.pwned") is None
        assert browser.js("return document.querySelectorAll('#view b, #view i, h1 b, #view img').length") == 0
        assert browser.js("return document.documentElement.scrollWidth") <= width
        paper = browser.js("return getComputedStyle(document.body).backgroundColor")
        assert paper == ("rgb(255, 255, 255)" if theme == "light" else "rgb(20, 23, 28)")
        if view.needs_plotly:
            assert browser.js("return document.querySelectorAll('.js-plotly-plot').length") == 2
            assert browser.js(OVERLAP) == []
        else:
            assert min(browser.js(INK)) > 4.5, "letters and colours have the contrast of WCAG 2 AA"
            assert browser.js("return [...document.querySelectorAll('.token')].map(b => b.firstChild.data)") == [
                display.visible(word) for word in HOSTILE
            ]


def test_attention_answers_to_mouse_keys_and_pickers(browser, opened):
    probs = causal(4, 3, 6, 6)
    opened(display.plot_attention_text(probs, list("abcdef")))

    def shown(values):
        return [f"{value:.3f}" if value >= 0.001 else value for value in values.tolist()]

    def same(layer, head, query):
        said = browser.js(NUMBERS)
        assert said[query + 1 :] == [""] * (5 - query)
        for text, value in zip(said, probs[layer, head, query, : query + 1].tolist(), strict=False):
            assert float(text) == pytest.approx(value, abs=6e-4)

    same(3, 0, 5)
    browser.js("document.querySelectorAll('.heads button')[2].click()")
    same(3, 2, 5)
    browser.js("document.querySelectorAll('.token')[3].onmouseenter()")
    same(3, 2, 3)
    browser.js("document.querySelector('.text').onmouseleave()")
    same(3, 2, 5)
    browser.js("document.querySelectorAll('.token')[4].click(); document.querySelector('.text').onmouseleave()")
    browser.js("document.querySelector('.token').onmouseenter(); document.querySelector('.text').onmouseleave()")
    browser.js("document.querySelector('[aria-label=\"next layer\"]').click()")
    assert browser.js("return document.querySelector('select').value") == "0"
    browser.js("document.querySelectorAll('.token')[4].onmouseenter()")
    same(0, 2, 4)
    browser.js("[...document.querySelectorAll('.controls button')].at(-1).click()")
    browser.js("document.querySelectorAll('.token')[1].onmouseenter()")
    said = browser.js(NUMBERS)
    assert said[0] == ""
    for query in range(1, 6):
        assert float(said[query]) == pytest.approx(probs[0, 2, query, 1].item(), abs=6e-4)
    assert "layer 0, head 2, key 1  b" in browser.js("return document.querySelector('.caption').textContent")
    picture = browser.js(
        "const c = document.querySelectorAll('.heads canvas')[1];"
        "return [c.width, c.height, ...c.getContext('2d').getImageData(1, 4, 1, 1).data]"
    )
    assert picture[:2] == [6, 6]
    assert picture[5] == pytest.approx(255 * probs[0, 1, 4, 1].item(), abs=1)


def test_activations_answer_to_the_picker(browser, opened):
    first, second = torch.randn(4, 3), torch.randn(2, 3)
    opened(display.plot_activations([list("abcd"), list("ef")], [first, second], units=[5, 6, 7], unit="nats"))
    for unit in (0, 1, 2):
        values = [*first[:, unit].tolist(), *second[:, unit].tolist()]
        assert [float(text) for text in browser.js(NUMBERS)] == pytest.approx(values, abs=6e-4)
        browser.js("document.querySelector('[aria-label=\"next neuron\"]').click()")
    browser.js("document.querySelectorAll('.token')[5].onmouseenter()")
    caption = browser.js("return document.querySelector('.caption').textContent")
    assert caption.startswith("neuron 5, position 1  f: ")
    assert float(caption.split(": ")[1].split()[0]) == pytest.approx(second[1, 0].item(), abs=6e-4)
    assert caption.endswith("nats")


def test_figures_stand_next_to_each_other_where_there_is_room(browser, opened):
    figures = [display.plot_patching(torch.randn(6, 10)) for _ in range(2)]
    tops = "return [...document.querySelectorAll('.panel')].map(p => p.getBoundingClientRect().top)"
    opened(display.side_by_side(*figures), 1400)
    assert len(set(browser.js(tops))) == 1
    opened(display.side_by_side(*figures), 600)
    assert len(set(browser.js(tops))) == 2


@pytest.mark.parametrize("width", [700, 1400])
def test_a_figure_wider_than_the_window_shrinks_and_still_answers(width, browser, opened):
    lens = dense(12, 30, 40)
    figure = display.plot_lens(lens, tokens=[f" w{i}" for i in range(30)], title="A long title " * 12)
    path = opened(figure, width)
    assert browser.errors() == []
    assert browser.requests() == [path.resolve().as_uri()]
    right, title, tools = browser.js(
        """
        const box = (found) => document.querySelector(found).getBoundingClientRect();
        return [box('.svg-container').right, box('.gtitle').top, box('.modebar-group').bottom];
        """
    )
    assert right <= width
    assert title >= tools - 1
    layer, position = 7, 20
    block = next(trace for trace in figure.data if trace.type == "heatmap" and position in trace.x)
    text = browser.hover(position, layer, block.xaxis + block.yaxis)
    assert text.startswith(f"layer {layer}, position {position}  ·w{position}")
    assert f"{lens[layer, position].max():.4f}" in text


def test_a_small_page_of_a_view_shows_the_same(browser, opened):
    """A page that finds plotly.js elsewhere holds its data compressed."""
    heat = display.plot_patching(torch.linspace(-1, 1, 6).view(2, 3), list("abc"))
    for view in (
        display.plot_attention_text(torch.eye(3).expand(2, 3, 3, 3), list("abc")),
        display.plot_activations(list("abc"), torch.tensor([[1.0, -2.0], [0.0, 1e-5], [float("nan"), 3.0]])),
        display.side_by_side(heat, heat),
    ):
        shown = []
        for plotlyjs in ("inline", "directory"):
            opened(view, plotlyjs=plotlyjs)
            assert browser.errors() == []
            shown.append((browser.js("return document.body.innerText"), browser.texts(), browser.js(NUMBERS)))
        assert shown[0] == shown[1]
        assert len(shown[0][0]) > 20 or len(shown[0][1]) > 5
