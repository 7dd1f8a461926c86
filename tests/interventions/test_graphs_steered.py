"""Influence, pruning, tables and files of attribution graphs; interventions on their features."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pytest
import torch

from nnterp.frozen import Tape, freeze
from nnterp.interventions import AttributionGraph, GraphNode, attribution_graph, validate_graph
from nnterp.traced import Activation, CrossLayerTranscoder, Dictionary, JumpRelu

from .slow_graphs import IDS, Slow, transcoders_of, whole

# Influence, written out: paths are followed one by one.


def influence_by_paths(shares, weights):
    found = [0.0] * len(weights)

    def follow(node, strength):
        for source, share in enumerate(shares[node]):
            if share:
                found[source] += strength * share
                follow(source, strength * share)

    for node, weight in enumerate(weights):
        if weight:
            follow(node, weight)
    return torch.tensor(found)


def small_graph():
    """Two features in a row, an error, an embedding and a logit."""
    edges = torch.zeros(6, 6)
    edges[0, [2, 4]] = torch.tensor([0.5, -1.5])
    edges[1, [0, 3, 4]] = torch.tensor([2.0, 1.0, -1.0])
    edges[5, [0, 1, 3]] = torch.tensor([1.0, -2.0, 0.1])
    nodes = (
        *(GraphNode("feature", 0, 0, 7, 1.0), GraphNode("feature", 1, 0, 4, 2.0), GraphNode("error", 0, 0)),
        *(GraphNode("error", 1, 0), GraphNode("embedding", None, 0, 3, label=" a\n")),
        GraphNode("logit", None, 0, 9, probability=0.5, label=' "b'),
    )
    zero = torch.zeros(6)
    weights = torch.tensor([0, 0, 0, 0, 0, 0.5])
    return AttributionGraph(
        nodes, edges, zero, zero, zero, edges.sum(1), torch.ones(6), weights, (" a\n",), (3,), 2, 0.0, {"num_layers": 2}
    )


def test_influence_and_scores():
    graph = small_graph()
    shares = graph.edges.abs() / graph.edges.abs().sum(1, keepdim=True).clamp(min=1e-30)
    expected = influence_by_paths(shares.tolist(), graph.weights.tolist())
    torch.testing.assert_close(graph.influence, expected)
    tokens, errors = float(expected[4]), float(expected[2] + expected[3])
    assert graph.replacement == pytest.approx(tokens / (tokens + errors))
    inputs = [(0, 0.25), (1, 0.25), (5, 0.1 / 3.1)]  # target, share of errors among what enters it
    weight = [float(expected[i] + graph.weights[i]) for i, _ in inputs]
    complete = sum(w * (1 - share) for w, (_, share) in zip(weight, inputs, strict=True)) / sum(weight)
    assert graph.completeness == pytest.approx(complete)


def test_pruning():
    graph = small_graph()
    part = graph.prune(node_threshold=0.84, edge_threshold=0.95)  # errors are the two weakest nodes
    assert [node.kind for node in part.nodes] == ["feature", "feature", "embedding", "logit"]
    assert float(part.sums().max()) < 1e-6  # what was pruned is in left_out
    assert float(part.edges[part.index("logit ' \"b'"), part.index("L1 F4 @0")]) == -2.0
    assert graph.prune(1.0, 1.0).edges.count_nonzero() == graph.edges.count_nonzero()
    with pytest.raises(ValueError, match="share"):
        graph.prune(80)


def test_pruned_graphs_of_models_keep_the_most_influence(tiny):
    graph = whole(tiny("llama"))
    part = graph.prune(0.8, 0.98)
    assert 20 < len(part) < len(graph)
    at = [graph.index(node) for node in part.nodes]
    shares = graph.edges.abs() / graph.edges.abs().sum(1, keepdim=True).clamp(min=1e-30)
    total = torch.linalg.solve(torch.eye(len(graph)) - shares.T, graph.weights) - graph.weights
    torch.testing.assert_close(graph.influence, total, atol=1e-5, rtol=1e-3)
    ordered = total.sort(descending=True)
    needed = int((ordered.values.cumsum(0) < 0.8 * total.sum()).sum()) + 1
    strongest = {*ordered.indices[:needed].tolist()}
    assert {i for i in at if graph.nodes[i].kind in ("feature", "error")} <= strongest
    assert float(part.sums().max()) < 1e-4


def test_the_viewers_file(tmp_path):
    """The fields of circuit-tracer's graph_models.py, with their types."""
    graph = small_graph()
    path = graph.save_viewer(tmp_path, "small", scan="toy", node_threshold=1.0, edge_threshold=1.0)
    graph.save_viewer(tmp_path, "second")
    listed = json.loads((tmp_path / "graph-metadata.json").read_text(encoding="utf-8"))["graphs"]
    assert [own["slug"] for own in listed] == ["small", "second"]
    made = json.loads(path.read_text(encoding="utf-8"))
    assert set(made) == {"metadata", "qParams", "nodes", "links"}
    assert {"slug": "small", "scan": "toy", "prompt": " a\n", "prompt_tokens": [" a⏎"]}.items() <= made[
        "metadata"
    ].items()
    assert made["metadata"]["transcoder_list"] == []
    assert made["metadata"]["pruning_settings"] == {"node_threshold": 1.0, "edge_threshold": 1.0}
    required = {
        "node_id",
        "feature",
        "layer",
        "ctx_idx",
        "feature_type",
        "jsNodeId",
        "clerp",
    }  # of Neuronpedia's schema
    assert all(required <= set(node) for node in made["nodes"])
    assert set(made["qParams"]) == {"pinnedIds", "supernodes", "linkType", "clickedId", "sg_pos"}
    types = {
        **dict.fromkeys(("node_id", "layer", "feature_type", "jsNodeId", "clerp"), str),
        **dict.fromkeys(("feature", "ctx_idx", "run_idx", "reverse_ctx_idx"), int),
        "token_prob": float,
        "is_target_logit": bool,
    }
    for node in made["nodes"]:
        assert {name: type(node[name]) for name in types} == types
    by_id = {node["node_id"]: node for node in made["nodes"]}
    assert len(by_id) == len(made["nodes"])
    assert set(by_id) == {"0_7_0", "1_4_0", "error_0_0", "error_1_0", "E_3_0", "3_9_0"}
    assert by_id["0_7_0"]["feature"] == 7 * 8 // 2 + 7
    assert by_id["E_3_0"]["layer"] == "E"
    assert by_id["3_9_0"]["clerp"] == 'Output " ”b" (p=0.500)'
    assert by_id["3_9_0"]["is_target_logit"]
    influences = [node["influence"] for node in made["nodes"] if node["feature_type"] != "logit"]
    assert all(0 < own <= 1.0001 for own in influences)
    links = {(link["source"], link["target"]): link["weight"] for link in made["links"]}
    assert links["1_4_0", "3_9_0"] == -2.0
    assert len(links) == 8
    for slug in ("", "a/b", "graph-metadata"):
        with pytest.raises(ValueError, match="slug"):
            graph.save_viewer(tmp_path, slug)


def test_tables_and_files(tiny, tmp_path):
    networkx = pytest.importorskip("networkx")
    graph = whole(tiny("qwen3")).prune()
    table = graph.to_dataframe()
    assert len(table) == int((graph.edges != 0).sum())
    first = table.iloc[0]
    assert abs(first.effect) == pytest.approx(float(graph.edges.abs().max()))
    net = graph.to_networkx()
    assert networkx.is_directed_acyclic_graph(net)
    assert net.edges[first.source, first.target]["effect"] == pytest.approx(first.effect)
    graph.save(tmp_path / "graph")
    again = AttributionGraph.load(tmp_path / "graph")
    assert again.nodes == graph.nodes
    assert torch.equal(again.edges, graph.edges)
    assert again.about == graph.about
    assert repr(again) == repr(graph)
    (tmp_path / "other.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"other\.safetensors"):
        AttributionGraph.load(tmp_path / "other")


# Interventions


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "gemma2", "mixtral", "bloom"])
def test_small_changes_are_what_the_graph_predicts(tiny, kind):
    """Nothing switches on or off, so that the local replacement model is the graph."""
    model = tiny(kind)
    graph = whole(model)
    supernode = [graph.nodes[i] for i in graph.of_kind("feature")[:3]]
    found = validate_graph(
        model,
        transcoders_of(model, skip=True),
        graph,
        [supernode, graph.top(1)[0][0]],
        factor=0.999,
        progress=False,
    )
    for of in ("logit", "feature"):
        predicted, measured = found.changes("frozen", of)
        size = float(measured.abs().max())
        assert size > 1e-4
        assert float((predicted - measured).abs().max()) < 0.01 * size
        assert found.correlation("frozen", of) > 0.999


def test_steering_in_the_model_is_that_of_hooks(tiny):
    model = tiny("llama")
    transcoders, graph = transcoders_of(model, skip=True), whole(tiny("llama"))
    node = next(own for own, _ in graph.top(20) if own.layer == 1)
    found = validate_graph(model, transcoders, graph, [node], factor=3.0, progress=False)
    blocks, seen = model._module.model.layers, {}

    def run(change):
        handles = [
            block.mlp.register_forward_pre_hook(lambda m, args, i=i: seen.__setitem__(i, args[0]))
            for i, block in enumerate(blocks)
        ]

        def hook(module, args, output):
            output = output.clone()
            output[0, node.position] += change * transcoders[1].decoder[node.feature]
            return output

        handles.append(blocks[1].mlp.register_forward_hook(hook))
        with torch.no_grad():
            logits = model._module(input_ids=torch.tensor([IDS])).logits[0, -1]
        for handle in handles:
            handle.remove()
        pre = {
            layer: (x[0] - transcoders[layer].input_bias) @ transcoders[layer].encoder.T for layer, x in seen.items()
        }
        return logits - logits.mean(), pre

    (before, pre_before), (after, pre_after) = run(0.0), run(2.0 * node.activation)
    for i, own in enumerate(graph.nodes):
        if own.kind == "logit":
            expected = float(after[own.feature] - before[own.feature])
        elif own.kind == "feature" and own.layer > 1:
            at = own.position, own.feature
            expected = float(pre_after[own.layer][at] - pre_before[own.layer][at])
        else:
            assert bool(found.model[0, i].isnan())
            continue
        assert float(found.model[0, i]) == pytest.approx(expected, abs=2e-4)
    assert float(after.sub(before).abs().max()) > 0.05


def test_activation_functions_that_jump(tiny):
    """Features below their threshold are no nodes; the slope is that of the others."""
    model = tiny("gpt2")

    def jump():
        return JumpRelu(torch.tensor(0.4))

    transcoders = transcoders_of(model, activation=jump)
    graph = attribution_graph(model, transcoders, IDS, progress=False)
    features = graph.of_kind("feature")
    assert min(graph.nodes[i].activation for i in features) > 0.4
    assert len(features) < len(whole(model).of_kind("feature"))
    assert graph.slopes[features].unique().tolist() == [1.0]
    assert graph.sum_error < 1e-4


def test_other_transcoders_than_the_graphs_are_refused(tiny):
    model = tiny("llama")
    with pytest.raises(ValueError, match="other transcoders"):
        validate_graph(model, transcoders_of(model, seed=5), whole(model), progress=False)


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "llama"])
def test_a_tape_gives_a_pass_the_constants_of_another(tiny, kind):
    """With the constants of a first pass, the stream after the layers is affine in what is written before."""
    model, tape = tiny(kind), Tape()
    ids = torch.tensor([IDS])

    def out(change):
        with torch.no_grad(), model.trace(ids):
            model.layers_input[0] = model.layers_input[0] + change
            for layer in range(model.num_layers):
                model.mlps_output[layer] = torch.zeros_like(model.mlps_output[layer])
            found = model.layers_output[-1].save()
        return found

    direction = torch.randn(1, len(IDS), model.hidden_size, generator=torch.Generator().manual_seed(1))
    plain = out(0 * direction)
    with freeze(model, ("patterns", "norms"), tape):
        torch.testing.assert_close(out(0 * direction), plain)
    with freeze(model, ("patterns", "norms"), tape):
        same, one, two = (out(k * direction) for k in range(3))
    torch.testing.assert_close(same, plain, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(two - same, 2 * (one - same), atol=1e-4, rtol=1e-3)
    free = out(2 * direction) - plain
    assert float((free - (two - same)).abs().max()) > 1e-2
    with freeze(model, ("patterns", "norms"), tape), pytest.raises(ValueError, match="tape"), torch.no_grad():
        model._module(input_ids=ids[:, :4])


def test_cross_layer_transcoders(tiny):
    """A feature writes to its own layer and all after it; errors are what all of them together miss."""
    model, generator = tiny("llama"), torch.Generator().manual_seed(3)
    count, width, features = model.num_layers, model.hidden_size, 16

    def random(*shape, scale=1.0):
        return scale * torch.randn(*shape, generator=generator)

    decoders = tuple(random(features, count - layer, width, scale=0.2) for layer in range(count))
    encoders = tuple(
        Dictionary(
            *(random(features, width, scale=width**-0.5), random(features, scale=0.3), decoders[layer][:, 0]),
            *(random(width, scale=0.1), Activation(), random(width, scale=0.1)),
            reads=f"mlps_input[{layer}]",
            writes=f"mlps_output[{layer}]",
        )
        for layer in range(count)
    )
    transcoder = CrossLayerTranscoder(encoders, decoders, "mlps_input", "mlps_output")
    graph = attribution_graph(model, transcoder, IDS, progress=False)
    assert graph.sum_error < 1e-4
    slow = Slow(model, "llama", dict(enumerate(encoders)), IDS)
    activations = slow.features()
    row = graph.of_kind("logit")[0]
    slopes = torch.autograd.grad(slow.logit(graph.nodes[row].feature), list(slow.leaves.values()))
    made = {
        layer: sum(activations[source] @ decoders[source][:, layer - source] for source in range(layer + 1))
        + encoders[layer].decoder_bias
        for layer in range(count)
    }
    for j, node in enumerate(graph.nodes):
        if node.kind == "feature":
            writes = [slopes[to][0, node.position] for to in range(node.layer, count)]
            along = sum(float(slope @ decoders[node.layer][node.feature, k]) for k, slope in enumerate(writes))
            expected = along * float(activations[node.layer][node.position, node.feature])
        elif node.kind == "error":
            missed = slow.leaves[node.layer][0, node.position] - made[node.layer][node.position]
            expected = float((slopes[node.layer][0, node.position] @ missed).detach())
        else:
            continue
        assert float(graph.edges[row, j]) == pytest.approx(expected, abs=1e-4)
    checked = validate_graph(model, transcoder, graph, factor=0.999, n=4, progress=False)
    predicted, measured = checked.changes("frozen", "logit")
    assert float((predicted - measured).abs().max()) < 0.01 * float(measured.abs().max())


def test_the_page_runs(tmp_path, monkeypatch):
    pytest.importorskip("networkx")
    page = (Path(__file__).parents[2] / "docs" / "attribution-graphs.md").read_text(encoding="utf-8")
    blocks = "\n".join(re.findall(r"^```python\n(.*?)^```$", page, flags=re.M | re.S))
    drawn = "\n".join(line for line in blocks.splitlines() if ".plot(" not in line)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "page.py").write_text(drawn, encoding="utf-8")
    names = runpy.run_path(str(tmp_path / "page.py"), run_name="page")
    assert names["graph"].sum_error < 1e-4
    assert AttributionGraph.load(tmp_path / "capital").nodes == names["small"].nodes
    assert (tmp_path / "graphs" / "capital.json").is_file()
    assert (names["feature"]["France"], names["feature"]["Japan"]) == (23, 206)  # as the page says, and what follows
    (first, most), (_, second), _ = names["capital"].top(3)
    assert (str(first), len(names["rest"])) == (names["japan"], 103)
    assert (most, second) == pytest.approx((0.37, 0.07), abs=0.005)
    ablated = names["ablated"]
    changes = torch.stack([own[:, -1] for own in (ablated.predicted, ablated.frozen, ablated.model)])
    expected = torch.tensor([[-6.59, -0.76], [-6.91, -0.74], [-18.51, -0.34]])
    torch.testing.assert_close(changes, expected, atol=0.02, rtol=0)
    assert float(names["logits"][0, -1].softmax(-1).max()) == pytest.approx(0.975, abs=0.002)
