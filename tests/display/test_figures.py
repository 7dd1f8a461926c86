"""What the figures hold, against slow loops; and what they refuse."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nnterp import display
from nnterp.testing import tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def causal(*shape):
    future = torch.triu(torch.ones(shape[-2:], dtype=torch.bool), 1)
    return torch.rand(shape).masked_fill(future, float("-inf")).softmax(-1)


@pytest.fixture(scope="module")
def lens():
    return (torch.randn(5, 7, 509, generator=torch.Generator().manual_seed(0)) * 3).softmax(-1)


def test_lens_probability(lens, tokenizer):
    heat, text = display.plot_lens(lens, tokenizer).data
    names = display.TokenNames(tokenizer)
    for i in range(5):
        for j in range(7):
            assert heat.z[i][j] == pytest.approx(lens[i, j].max().item(), rel=1e-6)
            lines = heat.hovertext[i][j].split("<br>")
            order = lens[i, j].argsort(descending=True)[:5].tolist()
            assert [display.escape(names(token)) in line for token, line in zip(order, lines[1:], strict=True)] == [
                True
            ] * 5
    assert len(text.text) == 35


def test_lens_rank_and_entropy_and_target(lens):
    rank = display.plot_lens(lens, color="rank").data[0]
    entropy = display.plot_lens(lens, color="entropy").data[0]
    ids = list(range(100, 107))
    target = display.plot_lens(lens, target=ids).data[0]
    target_rank = display.plot_lens(lens, target=ids, color="rank").data[0]
    for i in range(5):
        for j in range(7):
            row, last = lens[i, j], lens[-1, j].argmax()
            assert 10 ** rank.z[i][j] == pytest.approx(1 + (row > row[last]).sum().item())
            assert 10 ** target_rank.z[i][j] == pytest.approx(1 + (row > row[ids[j]]).sum().item())
            assert entropy.z[i][j] == pytest.approx(-(row * row.log()).sum().item(), rel=1e-4)
            assert target.z[i][j] == pytest.approx(row[ids[j]].item(), rel=1e-5)


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        (torch.randn(3, 4, 9), {}, "must be probabilities"),
        (torch.full((3, 4, 9), 0.5), {}, r"sums to 4\.5"),
        (torch.full((3,), 0.1), {}, "must have 2 or 3 axes"),
        (torch.zeros(0, 4, 9), {}, "is empty"),
        (torch.full((3, 4, 9), 0.1), {"tokens": ["a"]}, "tokens has 1 entries, but the position axis of lens has 4"),
        (torch.full((3, 4, 9), 0.1), {"layers": [0]}, "layers has 1 entries"),
        (torch.full((3, 4, 9), 0.1), {"color": "red"}, "color must be"),
        (torch.full((3, 4, 9), 0.1), {"target": 9}, "not in the vocabulary of 9"),
        (torch.full((3, 4, 9), 0.1), {"target": [1, 2]}, "target has 2 entries"),
    ],
)
def test_lens_refuses(given, options, message):
    with pytest.raises(ValueError, match=message):
        display.plot_lens(given, **options)


def test_lens_refuses_what_is_no_result():
    with pytest.raises(TypeError, match="it was given a SimpleNamespace"):
        display.plot_lens(SimpleNamespace(a=1))


def test_half_precision_and_one_position():
    figure = display.plot_lens(torch.full((3, 8), 0.125, dtype=torch.bfloat16))
    assert np.allclose(figure.data[0].z, 0.125)


def test_target_bands():
    values = torch.rand(41, 6, generator=torch.Generator().manual_seed(1))
    values[3, 2] = float("nan")
    figure = display.plot_targets({"right": values, "wrong": values / 2})
    band, line = figure.data[0], figure.data[1]
    for j in range(6):
        column = sorted(v for v in values[:, j].tolist() if v == v)
        quarter = np.quantile(column, [0.25, 0.5, 0.75])
        assert line.y[j] == pytest.approx(quarter[1])
        assert (band.y[-1 - j], band.y[j]) == (pytest.approx(quarter[0]), pytest.approx(quarter[2]))
    assert "median" in figure.layout.annotations[0].text
    mean = display.plot_targets({"right": values}, band="ci95").data
    column = [v for v in values[:, 2].tolist() if v == v]
    assert mean[1].y[2] == pytest.approx(np.mean(column))
    assert mean[0].y[2] == pytest.approx(np.mean(column) + 1.96 * np.std(column, ddof=1) / len(column) ** 0.5)
    assert len(display.plot_targets({"one": values[0]}).data) == 1
    assert len(display.plot_targets({"right": values}, band=None).data) == 1


@pytest.mark.parametrize(
    ("targets", "options", "message"),
    [
        ({}, {}, "no targets"),
        ({"a": torch.rand(3, 4), "b": torch.rand(3, 5)}, {}, "same number of layers"),
        ({"a": torch.rand(3, 4)}, {"band": "wide"}, "band must be"),
        ({"a": torch.rand(3, 4)}, {"layers": [1]}, "layers has 1"),
        ({"a": torch.rand(3, 4, 5)}, {}, "must have 1 or 2 axes"),
    ],
)
def test_targets_refuse(targets, options, message):
    with pytest.raises(ValueError, match=message):
        display.plot_targets(targets, **options)


def test_attention_blanks_the_future_and_nothing_else():
    probs = torch.rand(6, 6).tril()
    probs = probs / probs.sum(-1, keepdim=True)
    z = np.array(display.plot_attention(probs).data[0].z, dtype=float)
    assert np.isnan(z[np.triu_indices(6, 1)]).all()
    assert np.allclose(z[np.tril_indices(6)], probs.numpy()[np.tril_indices(6)])
    both = torch.full((6, 6), 1 / 6)
    assert not np.isnan(np.array(display.plot_attention(both).data[0].z, dtype=float)).any()


def test_wall_shows_each_head_in_its_tile():
    probs = torch.rand(3, 4, 5, 5).softmax(-1)
    figure = display.plot_attention(probs, layers=[2, 5, 7])
    (heat,) = figure.data
    z, rows, columns = np.array(heat.z, dtype=float), list(heat.y), list(heat.x)
    assert len(set(rows)) == len(rows) == len(z)
    assert len(set(columns)) == len(columns) == z.shape[1]
    for layer, name in enumerate(("2", "5", "7")):
        for head in range(4):
            for query in range(5):
                for key in range(5):
                    i = rows.index(f"layer {name}, query {query}  {query}")
                    j = columns.index(f"head {head}, key {key}  {key}")
                    assert z[i, j] == pytest.approx(probs[layer, head, query, key].item())
    assert rows.index("layer 7, query 0  0") < rows.index("layer 2, query 0  0"), "the last layer is on top"
    assert [note.text for note in figure.layout.annotations][:5] == ["L7 H0", "L7 H1", "L7 H2", "L7 H3", "L5 H0"]
    assert np.isfinite(z).sum() == probs.numel()


def test_wall_of_one_layer_names_each_tile():
    probs = torch.rand(5, 4, 4).softmax(-1)
    figure = display.plot_attention(probs, list("abcd"), heads=["<b>0</b>", 1, 2, 3, 4])
    assert [trace.name for trace in figure.data] == ["head &lt;b&gt;0&lt;/b&gt;", *(f"head {i}" for i in range(1, 5))]
    for head, trace in enumerate(figure.data):
        assert np.allclose(trace.z, probs[head])
        assert [str(name).replace("<i></i>", "") for name in trace.x] == [f"key {i}  {c}" for i, c in enumerate("abcd")]
        assert trace.hovertemplate.startswith("%{fullData.name}<br>%{y}<br>%{x}")
    assert [note.text for note in figure.layout.annotations] == [trace.name for trace in figure.data]


def test_a_wall_costs_a_page_no_text_for_each_cell():
    sizes = [len(display.plot_attention(causal(layers, 9, 20, 20)).to_json()) for layers in (5, 10, 20)]
    assert (sizes[2] - sizes[1]) / (sizes[1] - sizes[0]) == pytest.approx(2, abs=0.2)
    assert sizes[2] < 10 * 20 * 9 * 20 * 20


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (torch.randn(4, 4), "after the softmax"),
        (torch.ones(4, 4), "sum to 4"),
        (torch.full((5, 4), 0.1), "5 queries but only 4 keys"),
        (torch.full((60, 32, 20, 20), 0.01), "Choose layers, heads or positions"),
    ],
)
def test_attention_refuses(pattern, message):
    with pytest.raises(ValueError, match=message):
        display.plot_attention(pattern)


def test_tokens_flow_and_colours():
    figure = display.plot_tokens(
        ["The", " sky", "\n", " is", " blue"], torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0]), columns=20
    )
    bar = figure.data[0]
    assert list(bar.text) == ["The", "·sky", "↵", "·is", "·blue"]
    assert list(bar.y) == [0, 0, 0, 1, 1]
    assert (figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax) == (0, 4)
    signed = display.plot_tokens(["a", "b"], torch.tensor([-1.0, 3.0])).layout.coloraxis
    assert (signed.cmin, signed.cmax) == (-3, 3)
    with pytest.raises(ValueError, match="tokens has 2 entries, but values has 3"):
        display.plot_tokens(["a", "b"], torch.rand(3))


def test_patching_is_centred_on_zero():
    scores = torch.tensor([[0.5, -0.25], [float("nan"), 0.0]])
    heat = display.plot_patching(scores, ["a", "b"]).data[0]
    assert (heat.zmin, heat.zmax) == (-0.5, 0.5)
    text = display.plot_patching(torch.tensor([[-0.001, -0.25, 1.0]])).data[1].text
    assert list(text) == ["0.00", "−0.25", "1.00"]
    with pytest.raises(TypeError, match="no argument 'value'"):
        display.plot_patching(scores, value="x")
    with pytest.raises(ValueError, match="must have 2 axes"):
        display.plot_patching(torch.rand(3))


def test_patchscope_cells(tokenizer, lens):
    table = display.plot_patchscope(lens.transpose(0, 1)[:3], tokenizer, sources=["a", "b", "c"], top_k=2).data[0]
    names = display.TokenNames(tokenizer)
    for source in range(3):
        for layer in range(5):
            best = lens[layer, source].topk(2)
            lines = table.cells.values[1 + source][4 - layer].split("<br>")
            for line, token, value in zip(lines, best.indices.tolist(), best.values.tolist(), strict=True):
                assert line.startswith(display.escape(names(token)))
                assert line.endswith(f"{value:.2f}")
    with pytest.raises(ValueError, match="one reading per layer"):
        display.plot_patchscope([["a", "b"], ["c"]])


def test_topk_tokens_as_in_one_x(tokenizer, tmp_path, lens):
    probs = lens.transpose(0, 1)[:4]
    figure = display.plot_topk_tokens(
        probs, tokenizer, k=3, title="Top", file=str(tmp_path / "a" / "f.html"), show=False
    )
    assert (tmp_path / "a" / "f.html").exists()
    assert figure.layout.title.text == "Top"
    heats = [trace for trace in figure.data if trace.type == "heatmap"]
    assert len(heats) == 4
    for prompt, heat in enumerate(heats):
        assert np.allclose(heat.z, probs[prompt].topk(3).values)
    ids = display.plot_topk_tokens(probs[0], tokenizer, k=3, use_token_ids=True, show=False)
    assert list(ids.data[1].text)[:3] == [str(i) for i in probs[0, 0].topk(3).indices.tolist()]
    assert len(display.plot_topk_tokens(probs[0, 0], tokenizer, show=False).data) == 2
    many = display.plot_topk_tokens(probs[:1].expand(40, -1, -1), tokenizer, show=False)
    assert len([trace for trace in many.data if trace.type == "heatmap"]) == 40
    with pytest.raises(ValueError, match="k goes from 1 to 509"):
        display.plot_topk_tokens(probs, tokenizer, k=510, show=False)
    with pytest.raises(ValueError, match="must be probabilities"):
        display.plot_topk_tokens(torch.randn(2, 9), tokenizer, show=False)


def test_frames(tokenizer, lens, tiny):
    frame = display.top_tokens_to_df(lens.transpose(0, 1), tokenizer, k=2)
    assert list(frame.columns) == ["prompt_index", "layer", "rank", "id", "token", "probability"]
    row = frame[(frame.prompt_index == 3) & (frame.layer == 2) & (frame["rank"] == 1)].iloc[0]
    assert (row.id, row.probability) == (lens[2, 3].argmax().item(), pytest.approx(lens[2, 3].max().item()))
    prompts = [
        SimpleNamespace(
            prompt="A",
            target_strings={"target": "x", "other": ["y", "z"]},
            target_tokens={"target": [5], "other": [6, 7]},
        ),
        SimpleNamespace(prompt="B", target_strings=None, target_tokens={"target": [8]}),
    ]
    frame = display.prompts_to_df(prompts, tokenizer)
    assert frame[0]["other_string"] == ["y", "z"]
    assert frame[0]["other_tokens"] == tokenizer.convert_ids_to_tokens([6, 7])
    assert list(display.prompts_to_df(prompts).index) == ["prompt", "target_string", "other_string"]
    model = tiny("llama")
    frame = display.certificate_to_df(model.certificate)
    assert list(frame.claim) == [line.name for line in model.certificate.lines]
    assert dict(display.anatomy_to_df(model.anatomy).values)["ln_final"] == "model.norm"


def test_certificate_figure(tiny):
    certificate = tiny("llama").certificate
    table = display.plot_certificate(certificate).data[0]
    assert [claim.replace("<br>", " ") for claim in table.cells.values[1]] == [
        display.escape(line.name) for line in certificate.lines
    ]
    assert list(table.cells.values[2]) == [row[2] for row in certificate.rows()]


def test_components_from_numbers():
    figure = display.plot_components(torch.tensor([3.0, 1.0]), ["<b>a</b>", "c"], baseline=2.0, score="nats")
    bars = figure.data[0]
    assert list(bars.x) == [1.0, -1.0]
    assert bars.marker.cmax == -bars.marker.cmin == 1.0
    assert "&lt;b&gt;" in figure.layout.yaxis.ticktext[0]
    assert bars.hovertext[1] == "c<br>change of nats -1.0000<br>nats 1.0000"
    with pytest.raises(ValueError, match="components has 1 entries"):
        display.plot_components(torch.rand(2), ["a"])
    with pytest.raises(TypeError, match="no argument 'prompts'"):
        display.plot_components(torch.rand(2), prompts="mean")
    same = display.plot_components(torch.zeros(2))
    assert same.data[0].marker.cmax == 1.0


def test_a_circuit_is_nodes_by_layer_and_head():
    edges = [
        ("embeddings", "L0 H1", 0.5),
        ("L0 H1", "L2 mlp", -2.0),
        ("L2 mlp", "logits", 1.9),
        ("L0 H1", "logits", 0.1),
    ]
    figure = display.plot_circuit(edges)
    nodes = next(trace for trace in figure.data if trace.name == "nodes")
    at = dict(zip(nodes.hovertext, zip(nodes.x, nodes.y, strict=True), strict=True))
    assert at["L0 H1"] == (1.0, 0.0)
    assert at["embeddings"][1] < at["L0 H1"][1] < at["L2 mlp"][1] < at["logits"][1]
    lines = [trace for trace in figure.data if trace.mode == "lines"]
    widest = max((trace for trace in lines if trace.name == "lowers the metric"), key=lambda trace: trace.line.width)
    assert list(widest.x)[:2] == [at["L0 H1"][0], at["L2 mlp"][0]]
    assert list(widest.y)[:2] == [at["L0 H1"][1], at["L2 mlp"][1]]
    raising = [trace for trace in lines if trace.name == "raises the metric"]
    assert sum(list(trace.x).count(None) for trace in raising) == 3
    assert len({trace.line.width for trace in raising}) == 3
    hover = next(trace for trace in figure.data if trace.name == "edges").hovertext
    assert hover[0] == "L0 H1 → L2 mlp<br>score -2.0000"
    assert "strongest" not in (figure.layout.title.text or "")
    assert "the 2 strongest of 4 edges" in display.plot_circuit(edges, edges=2).layout.title.text
    with pytest.raises(ValueError, match="'head 3' is no node"):
        display.plot_circuit([("head 3", "logits", 1.0)])
    with pytest.raises(ValueError, match="no edges"):
        display.plot_circuit([])
    with pytest.raises(TypeError, match="plot_circuit"):
        display.plot_circuit(3)


def test_faithfulness_is_a_curve_beside_random_circuits():
    figure = display.plot_faithfulness([1.0, 0.2, 0.7], [1.0, 0.01, 0.1], random=[[1.0, 0.0, 0.1]])
    assert [trace.name for trace in figure.data] == ["random circuits", "circuit"]
    assert np.allclose(figure.data[1].x, [0.01, 0.1, 1.0])
    assert np.allclose(figure.data[1].y, [0.2, 0.7, 1.0])
    assert np.allclose(figure.data[0].y, [0.0, 0.1, 1.0])
    assert figure.layout.xaxis.type == "log"
    assert display.plot_faithfulness([0.0, 1.0], [0, 1]).layout.xaxis.type == "linear"
    for arguments, message in [(([1.0],), "Give sizes"), (([1.0, 2.0], [0.1]), "sizes has 1 entries")]:
        with pytest.raises(ValueError, match=message):
            display.plot_faithfulness(*arguments)


def test_steering_lines_run_by_factor():
    effect, damage = torch.tensor([[3.0, 1.0, 2.0], [6.0, 4.0, 5.0]]), torch.tensor([[0.3, 0.1, 0.2], [0.6, 0.4, 0.5]])
    figure = display.plot_steering(effect, damage, layers=[3, 7], factors=[4.0, 0.5, 2.0], plain=0.05)
    assert [trace.name for trace in figure.data] == ["3", "7"]
    assert np.allclose(figure.data[1].x, [0.4, 0.5, 0.6])
    assert np.allclose(figure.data[1].y, [4.0, 5.0, 6.0])
    assert figure.data[0].hovertext[0] == "layer 3, factor 0.5<br>effect 1.0000<br>damage 0.1000"
    assert figure.layout.shapes[0].x0 == 0.05
    for arguments, message in [
        ((effect,), "Give damage"),
        ((effect, damage[:1]), r"shape \[2, 3\] and damage \[1, 3\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            display.plot_steering(*arguments)


def test_an_attribution_graph_is_tokens_by_layers():
    import torch

    from nnterp.interventions import AttributionGraph, GraphNode

    nodes = (
        GraphNode("feature", 0, 0, 7, 1.0),
        GraphNode("feature", 2, 1, 4, 2.0),
        GraphNode("error", 0, 1),
        GraphNode("embedding", None, 0, 3, label=" <b>"),
        GraphNode("embedding", None, 1, 5, label=" b"),
        GraphNode("logit", None, 1, 9, probability=0.5, label=" c"),
    )
    edges = torch.zeros(6, 6)
    edges[0, 3], edges[1, 0], edges[1, 2], edges[5, 1] = 2.0, -3.0, 1.0, 0.5
    weights, zero = torch.tensor([0, 0, 0, 0, 0, 0.5]), torch.zeros(6)
    graph = AttributionGraph(
        *(nodes, edges, zero, zero, zero, edges.sum(1), zero, weights, (" <b>", " b"), (3, 5), 2, 0.0)
    )
    figure = display.plot_attribution_graph(graph, labels={"L2 F4 @1": "<i>capital</i>"})
    by_name = {trace.name: trace for trace in figure.data if "markers" in trace.mode}
    features = by_name["features"]
    assert list(features.x) == [0.0, 1.0]
    assert by_name["embeddings"].y[0] < features.y[0] < features.y[1] < by_name["logits"].y[0]
    assert list(features.text) == ["", "&lt;i&gt;capital&lt;/i&gt;"]
    assert "L0 F7 @0<br>activation 1.0000<br>influence 0.3750" in features.hovertext[0]
    assert features.marker.size[1] > features.marker.size[0]
    assert list(figure.layout.xaxis.ticktext) == ["·&lt;b&gt;", "·b"]
    assert list(figure.layout.yaxis.ticktext) == ["embeddings", "0", "2", "logits"]
    lines = [trace for trace in figure.data if trace.mode == "lines"]
    (lowering,) = [trace for trace in lines if trace.name == "lowers"]
    assert list(lowering.x)[:2] == [0.0, 1.0]
    assert by_name["edges"].hovertext[0] == "L2 F4 @1 → logit ' c'<br>effect 0.5000, 100% of what enters"
    assert "the 2 strongest of 4 edges" in display.plot_attribution_graph(graph, edges=2).layout.title.text
    with pytest.raises(KeyError, match="L9"):
        display.plot_attribution_graph(graph, labels={"L9 F4 @1": "x"})
    with pytest.raises(TypeError, match="plot_attribution_graph"):
        display.plot_attribution_graph(3)
