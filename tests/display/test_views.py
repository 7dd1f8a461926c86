"""Scales, blocks and views: what they hold, against slow loops; and what they refuse."""

from __future__ import annotations

import base64
import json
import math
import re
import tomllib
import zlib
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import plotly.graph_objects as go
import pytest
import torch

from nnterp import display

GENERATOR = torch.Generator().manual_seed(3)
LENS = (torch.randn(7, 23, 40, generator=GENERATOR) * 3).softmax(-1)
WORDS = [f" w{i}" for i in range(23)]


def written(value):
    """A number as the pages write it."""
    return float(f"{value:.3f}" if abs(value) >= 0.001 or value == 0 else f"{value:.1e}")


def heats(figure):
    return [trace for trace in figure.data if trace.type == "heatmap"]


def test_blocks_hold_every_column_once_and_fit_the_page():
    figure = display.plot_lens(LENS, tokens=WORDS, page=600)
    assert figure.layout.width <= 600
    blocks = heats(figure)
    assert len(blocks) > 1
    assert [x for block in blocks for x in block.x] == list(range(23))
    assert np.allclose(np.concatenate([block.z for block in blocks], 1), LENS.max(-1).values)
    domains = [figure.layout[f"yaxis{block.yaxis[1:]}"].domain for block in blocks]
    assert all(above[0] > below[1] for above, below in pairwise(domains))
    assert len(heats(display.plot_lens(LENS, tokens=WORDS, page=3000))) == 1
    assert all(block.showscale is not False for block in blocks), "a colour bar beside each block"


def test_stride_keeps_the_last_layer_and_positions_are_chosen():
    (block,) = heats(display.plot_lens(LENS, every=3, positions=[-1, 2]))
    assert np.allclose(block.z, LENS.max(-1).values[[0, 3, 6]][:, [22, 2]])
    figure = display.plot_lens(LENS, every=4, positions=slice(5, None, 9))
    assert list(figure.layout.yaxis.ticktext) == ["2", "6"]
    assert list(figure.layout.xaxis.ticktext) == ["5", "14"]
    for options, error, message in [
        ({"positions": [23]}, IndexError, "no column 23: this lens has 23"),
        ({"positions": slice(30, None)}, ValueError, "leaves none of the 23"),
        ({"every": 0}, ValueError, "every must be at least 1"),
        ({"top_k": 0}, ValueError, "top_k must be at least 1"),
        ({"scale": "square"}, ValueError, "scale must be"),
        ({"scale": "log", "color": "entropy"}, ValueError, "a scale of probabilities"),
    ]:
        with pytest.raises(error, match=message):
            display.plot_lens(LENS, **options)


def test_top_k_is_in_the_cells_where_it_was_asked_for():
    text = display.plot_lens(LENS[:, :3], top_k=3).data[1].text
    order = LENS[2, 1].argsort(descending=True)[:3].tolist()
    assert text[2 * 3 + 1].split("<br>") == [display.escape(f"⟨id {token}⟩") for token in order]
    assert "<br>" not in display.plot_lens(LENS[:, :3]).data[1].text[0]


def test_divergence_from_the_last_layer_as_a_colour():
    (block,) = heats(display.plot_lens(LENS, color="kl", page=3000))
    for i in range(7):
        for j in range(23):
            p, q = LENS[-1, j].double(), LENS[i, j].double()
            assert block.z[i][j] == pytest.approx(float((p * (p / q).log()).sum()), abs=1e-6)
    certain = torch.eye(2)[None].expand(2, -1, -1)
    assert np.allclose(heats(display.plot_lens(certain, color="kl"))[0].z, 0)


def test_scales_put_probabilities_where_they_belong():
    probs = torch.tensor([[1e-12, 1e-3, 0.5, 0.999, 0.0, 1.0]])
    log = display.plot_targets({"a": probs}, scale="log", band=None)
    assert np.allclose(log.data[0].y, [-12, -3, math.log10(0.5), math.log10(0.999), -12, 0])
    assert "such as exactly 0, are drawn at 1e-12" in log.layout.annotations[0].text.replace("<br>", " ")
    ticks = dict(zip(log.layout.yaxis.tickvals, log.layout.yaxis.ticktext, strict=True))
    assert (ticks[0], ticks[-12]) == ("1", "1e-12")
    odds = display.plot_targets({"a": probs}, scale="logodds", band=None)
    assert np.allclose(odds.data[0].y[:4], [math.log10(p / (1 - p)) for p in probs[0, :4].double().tolist()], atol=1e-4)
    assert odds.data[0].y[4] == odds.data[0].y.min()
    assert odds.data[0].y[5] == odds.data[0].y.max()
    for place, said in zip(odds.layout.yaxis.tickvals, odds.layout.yaxis.ticktext, strict=True):
        if "−" not in said and "e" not in said:
            assert float(said) == pytest.approx(10**place / (1 + 10**place), rel=1e-6)
    assert "layer 4: 0.0000" in log.data[0].hovertext[4], "hovering says the number itself"
    (block,) = heats(display.plot_lens(LENS, scale="log", page=3000))
    assert np.allclose(block.z, LENS.max(-1).values.log10())


def test_ranks_are_drawn_as_they_are():
    ranks = torch.tensor([[40000.0, 300.0, 1.0], [20000.0, 200.0, 3.0]])
    figure = display.plot_targets({"a": ranks}, value="rank")
    assert np.allclose(figure.data[1].y, [30000, 250, 2])
    assert figure.layout.yaxis.type == "log"
    assert figure.layout.yaxis.range[0] > figure.layout.yaxis.range[1], "rank 1 is at the top"
    assert "scale" not in figure.layout.annotations[0].text
    for given, options, message in [
        (ranks - 1, {"value": "rank"}, "no rank; ranks are counted from 1"),
        (ranks, {"scale": "log"}, "is for probabilities"),
        (ranks, {"value": "rank", "scale": "log"}, "logarithmic axis already"),
        (ranks, {"value": "loss"}, "value must be"),
    ]:
        with pytest.raises(ValueError, match=message):
            display.plot_targets({"a": given}, **options)
    assert display.plot_targets({"a": ranks}, unit="loss").data[1].y[0] == 30000, "other numbers are not cut at 1"


def test_a_long_title_is_wrapped_and_the_figure_grows_by_its_lines():
    short, long = (display.plot_steering(torch.rand(2, 2), torch.rand(2, 2), title="word " * n) for n in (2, 60))
    lines = long.layout.title.text.split("<br>")
    assert " ".join(lines) == " ".join(["word"] * 60)
    assert max(map(len, lines)) < 100
    assert long.layout.height - short.layout.height == long.layout.margin.t - short.layout.margin.t
    assert long.layout.margin.t - short.layout.margin.t >= 18 * (len(lines) - 1)


@pytest.mark.parametrize("causal", [True, False])
def test_attention_over_the_text_holds_every_number(causal):
    probs = torch.rand(2, 3, 4, 6, generator=GENERATOR)
    if causal:
        probs = probs * torch.tril(torch.ones(4, 6), 2)
    probs = probs / probs.sum(-1, keepdim=True)
    probs[0, 0, 3, :3] = torch.tensor([0.0, 3.14e-7, 0.000949])
    data = display.plot_attention_text(probs, list("abcdef"), layers=[3, 9]).data
    assert (data["layers"], data["heads"], data["tokens"]) == (["3", "9"], ["0", "1", "2"], list("abcdef"))
    assert data["causal"] is causal
    found = iter(data["values"])
    for layer in range(2):
        for head in range(3):
            for query in range(4):
                for key in range(query + 3 if causal else 6):
                    assert next(found) == written(probs[layer, head, query, key].item())
    assert next(found, None) is None
    with pytest.raises(ValueError, match="after the softmax"):
        display.plot_attention_text(probs * 2)


def test_activations_over_several_texts():
    first, second = torch.randn(3, 2, generator=GENERATOR), torch.randn(1, 2, generator=GENERATOR)
    data = display.plot_activations([list("abc"), ["d"]], [first, second], units=[7, "<b>"], texts=["one", "two"]).data
    assert data["units"] == ["7", "<b>"]
    for text, values in zip(data["texts"], (first, second), strict=True):
        assert text["values"] == [written(value) for value in values.T.flatten().tolist()]
    for tokens, values, message in [
        (list("ab"), first, "tokens has 2 entries"),
        ([list("abc"), ["d"]], [first, second[:, :1]], "same units"),
        ([list("abc")], [first, second], "tokens has 1 entries"),
    ]:
        with pytest.raises(ValueError, match=message):
            display.plot_activations(tokens, values)


def test_activations_of_a_result_are_those_of_one_prompt():
    result = SimpleNamespace(
        tensors={"activations": torch.arange(12.0).view(2, 3, 2), "input_ids": torch.tensor([[5, 6, 7], [5, 8, -1]])},
        axes={"activations": ("prompts", "positions", "features"), "input_ids": ("prompts", "positions")},
        labels={"prompts": ("a", "b"), "positions": (0, 1, 2), "features": (70, 90)},
        vocabulary={5: "The", 6: " sky", 7: "·", 8: "\ufffd"},
        token_bytes={8: "e2"},
    )
    data = display.plot_activations(result, prompt=1).data
    assert (data["kind"], data["units"]) == ("feature", ["70", "90"])
    assert data["texts"][0]["tokens"] == ["The", "⟨E2⟩"]
    assert data["texts"][0]["values"] == [6, 8, 7, 9]
    assert display.plot_activations(result, prompt=0).data["texts"][0]["tokens"] == ["The", "·sky", "⟨U+00B7⟩"]
    with pytest.raises(ValueError, match="2 prompts: choose one"):
        display.plot_activations(result)
    result.axes["activations"] = ("prompts", "layers", "features")
    with pytest.raises(ValueError, match="positions and one further axis"):
        display.plot_activations(result)


def test_surprise_is_the_loss_of_each_token():
    logits, ids = torch.randn(6, 40, generator=GENERATOR) * 4, [3, 9, 9, 0, 39, 5]
    figure = display.plot_surprise(logits, ids, top_k=2)
    losses = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none")
    assert np.isnan(figure.data[0].marker.color[0])
    assert list(figure.data[0].text) == [f"⟨id {token}⟩" for token in ids]
    assert np.allclose(figure.data[0].marker.color[1:], losses, atol=1e-5)
    assert f"Loss {losses.mean():.3f} nats" in figure.layout.title.text
    logs = logits.log_softmax(-1)
    for i, token in enumerate(ids[1:]):
        said = figure.data[0].hovertext[i + 1]
        assert f"rank {(logs[i] > logs[i, token]).sum() + 1}<br>" in said
        entropy = -(logs[i].exp() * logs[i]).sum()
        assert float(re.search(r"entropy ([\d.e-]+)", said)[1]) == pytest.approx(entropy.item(), rel=0.05)
        assert f"1. ⟨id {logs[i].argmax()}⟩" in said
    assert np.allclose(display.plot_surprise(logs, ids).data[0].marker.color[1:], losses, atol=1e-5)
    for given, tokens, message in [
        (logits.softmax(-1), ids, "holds probabilities; give logits"),
        (logits, ids[:-1], "6 positions and tokens 5"),
        (logits, [*ids[:-1], 40], "vocabulary of 40"),
        (logits * float("nan"), ids, "holds NaN"),
    ]:
        with pytest.raises(ValueError, match=message):
            display.plot_surprise(given, tokens)


def test_a_generation_shows_what_was_taken_and_what_was_expected():
    logits, ids = torch.randn(9, 40, generator=GENERATOR), list(range(9))
    figure = display.plot_generation(logits, ids, top_k=3, page=420)
    z = np.concatenate([block.z for block in heats(figure)], 1)
    probs = logits.softmax(-1)
    assert np.allclose(z[0], [probs[i, token] for i, token in enumerate(ids)])
    assert np.allclose(z[1:], probs.topk(3).values.T)
    assert list(figure.layout.yaxis.ticktext) == ["taken", "1", "2", "3"]
    assert figure.layout.yaxis.range[0] > figure.layout.yaxis.range[1], "what was taken is on top"
    text = next(trace for trace in figure.data if trace.type == "scatter")
    assert text.text[0] == "⟨id 0⟩"


def test_figures_side_by_side_share_their_colours_and_stay_readable():
    def entropy(sharpness):
        return display.plot_lens((torch.randn(3, 4, 30, generator=GENERATOR) * sharpness).softmax(-1), color="entropy")

    one, two = entropy(0.1), entropy(8.0)
    before = one.to_json(), two.to_json()
    view = display.side_by_side(one, two, title="Two")
    ends = [figure["data"][0]["zmax"] for figure in view.data["figures"]]
    assert ends[0] == ends[1] == max(one.data[0].zmax, two.data[0].zmax)
    assert (one.to_json(), two.to_json()) == before
    lone = display.side_by_side(one, two, same_scale=False).data["figures"]
    assert [figure["data"][0]["zmax"] for figure in lone] == [one.data[0].zmax, two.data[0].zmax]
    same = display.side_by_side(two, two).data["figures"][0]["data"][1]["textfont"]["color"]
    assert list(same) == list(two.data[1].textfont.color)
    assert set(view.data["figures"][1]["data"][1]["textfont"]["color"]) == {"#000000"}, "certain cells are bright"
    tokens = [display.plot_tokens(list("ab"), torch.tensor([0.0, top]), name="loss") for top in (1.0, 4.0)]
    shared = display.side_by_side(*tokens).data["figures"]
    assert [figure["layout"]["coloraxis"]["cmax"] for figure in shared] == [4.0, 4.0]
    with pytest.raises(ValueError, match="two figures or more, not 1"):
        display.side_by_side(one)
    with pytest.raises(TypeError, match="not a str"):
        display.side_by_side(one, "two")


def drawn(page):
    """The figure that a small page holds."""
    return json.loads(zlib.decompress(base64.b64decode(re.search(r"unsqueezed\('([^']+)'", page)[1])))


def test_small_pages_keep_colours_of_small_numbers_and_frames(tmp_path):
    """Norms of values may all be below the digits that hovering shows; colours go up to the largest of them."""
    weighted = 3e-5 * torch.rand(5, 5, generator=GENERATOR)
    figure = display.plot_attention(weighted, list("abcde"), weighted=True)
    page = display.save(figure, tmp_path / "small.html", plotlyjs="cdn").read_text()
    (heat,) = (trace for trace in drawn(page)["data"] if trace["type"] == "heatmap")
    assert np.allclose(np.array(heat["z"], dtype=float), heats(figure)[0].z, atol=float(weighted.max()) / 1000)
    moving = go.Figure([go.Scatter(y=[1, 2])], frames=[go.Frame(data=[go.Scatter(y=[2, 1])])])
    page = display.save(moving, tmp_path / "moving.html", plotlyjs="cdn").read_text()
    assert drawn(page)["frames"][0]["data"][0]["y"] == [2, 1]
    assert "Plotly.addFrames('figure', drawn.frames)" in page


def test_infinite_activations_are_drawn():
    view = display.plot_activations(["a", "b"], torch.tensor([[1.0, torch.inf], [-torch.inf, torch.nan]]))
    stored = re.search(r'<script type="application/json" id="data">(.*?)</script>', view.page())[1]
    values = json.loads(stored)["texts"][0]["values"]
    assert [math.nan if value is None else float(value) for value in values[:3]] == [1, -math.inf, math.inf]
    assert values[3] is None


def test_pages_are_small_where_that_was_asked_for(tmp_path):
    figure = display.plot_attention(torch.rand(12, 12, 5, 5).softmax(-1))
    view = display.plot_attention_text(torch.rand(12, 12, 5, 5).softmax(-1), list("abcde"))
    whole = display.save(figure, tmp_path / "whole.html").read_text()
    assert len(whole) > 3e6
    assert "https://cdn" not in whole.split("<body>")[0]
    assert not (tmp_path / "plotly.min.js").exists()
    beside = display.save(figure, tmp_path / "beside.html", plotlyjs="directory")
    assert beside.stat().st_size < 300_000
    assert (tmp_path / "plotly.min.js").stat().st_size > 3e6
    cdn = display.save(figure, tmp_path / "cdn.html", plotlyjs="cdn")
    assert cdn.stat().st_size < 300_000
    assert "https://cdn.plot.ly/plotly-" in cdn.read_text()
    future = torch.ones(20, 20, dtype=torch.bool).triu(1)
    scores = 4 * torch.randn(30, 9, 20, 20, generator=GENERATOR)
    wall = display.plot_attention(scores.masked_fill(future, -torch.inf).softmax(-1))
    lens = (3 * torch.randn(30, 60, 40, generator=GENERATOR)).softmax(-1)
    table = display.plot_lens(lens, tokens=[" word"] * 60)
    for large in (wall, table):  # a model with 30 layers of 9 heads
        assert display.save(large, tmp_path / "large.html", plotlyjs="cdn").stat().st_size < 300_000
        assert len(large.to_json()) > 300_000
    page = display.save(view, tmp_path / "view.html")
    assert page.stat().st_size < 300_000
    assert "http" not in page.read_text().replace("http://www.w3.org", "")
    (tmp_path / "other").mkdir()
    display.save(view, tmp_path / "other" / "view.html", plotlyjs="directory")
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["view.html"], "a text needs no plotly.js"
    with pytest.raises(ValueError, match="plotlyjs must be"):
        display.save(figure, tmp_path / "a.html", plotlyjs="web")
    with pytest.raises(ValueError, match=r"cannot become a \.png"):
        display.save(view, tmp_path / "a.png")


def test_views_keep_hostile_texts_as_data():
    words = ["</script><script>window.pwned=1</script>", "<b>", "&amp;", "\u2028", "\ud800"]
    view = display.plot_activations(words, torch.ones(5, 1), title="</h1><script>x</script>")
    page = view.page()
    assert "<script>window.pwned" not in page
    assert "<script>x" not in page
    stored = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])
    assert stored["texts"][0]["tokens"] == [display.visible(word) for word in words]
    assert "prefers-color-scheme" in page.split("<body>")[0]
    assert "prefers-color-scheme" not in view.page(theme="dark").split("<body>")[0]
    assert 'srcdoc="' in view._repr_html_()
    with pytest.raises(ValueError, match="theme must be"):
        view.page(theme="blue")


def test_entry_points_lead_to_figures():
    project = tomllib.loads((Path(__file__).parents[2] / "packages/nnterp-display/pyproject.toml").read_text())
    points = project["project"]["entry-points"]["nnterp.figures"]
    assert points.keys() >= {"attention_text", "activations", "surprise", "generation"}
    for name, target in points.items():
        module, function = target.split(":")
        assert module == "nnterp.display"
        assert callable(getattr(display, function)), name
        assert function in display.__all__
