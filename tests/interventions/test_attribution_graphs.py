"""Attribution graphs against plain torch hooks and autograd on HuggingFace's modules."""

from __future__ import annotations

import json
import re
import runpy
from functools import cache
from pathlib import Path

import pytest
import torch

from nnterp import StandardizedTransformer
from nnterp.errors import InsideTraceError, RemoteModelError, Unavailable
from nnterp.frozen import Tape, freeze
from nnterp.interventions import AttributionGraph, attribution_graph, validate_graph
from nnterp.testing import tiny_model, tiny_tokenizer
from nnterp.traced import Activation, CrossLayerTranscoder, Dictionary, JumpRelu, UnitVariance

from .slow_graphs import BUILDS, Slow

IDS = [5, 9, 12, 7, 30, 22, 17]


def transcoders_of(model, features=20, seed=0, skip=False, activation=Activation):
    """Random transcoders of every feed-forward."""
    generator = torch.Generator().manual_seed(seed)
    width = model.hidden_size

    def random(*shape, scale=1.0):
        return scale * torch.randn(*shape, generator=generator)

    return {
        layer: Dictionary(
            random(features, width, scale=width**-0.5),
            random(features, scale=0.3),
            random(features, width, scale=0.3),
            random(width, scale=0.1),
            activation(),
            input_bias=random(width, scale=0.1),
            skip=random(width, width, scale=0.5 * width**-0.5) if skip else None,
            reads=f"mlps_input[{layer}]",
        )
        for layer in range(model.num_layers)
    }


@cache
def whole(model):
    """The graph of one model, with skip transcoders, made once."""
    return attribution_graph(model, transcoders_of(model, skip=True), IDS, progress=False)


@pytest.mark.parametrize("kind", BUILDS)
def test_edges_are_those_of_autograd_over_hooks(tiny, kind):
    """Sequential and parallel blocks, post-norms, softcaps, mixtures of experts, multipliers; with skip transcoders."""
    model = tiny(kind)
    transcoders = transcoders_of(model, skip=True)
    graph = whole(model)
    slow = Slow(model, kind, transcoders, IDS)
    assert [(n.layer, n.position, n.feature) for n in graph.nodes if n.kind == "feature"] == [
        (layer, *at) for layer, own in slow.features().items() for at in own.nonzero().tolist()
    ]
    features, logits = graph.of_kind("feature"), graph.of_kind("logit")
    for i in (features[3], features[len(features) // 2], *features[-5::2], *logits[:2]):
        node = graph.nodes[i]
        if node.kind == "logit":
            target = slow.logit(node.feature)
        else:
            target = slow.pre_activation(node.layer, node.position, node.feature)
        expected = slow.effects(target)
        found = torch.zeros(len(graph))
        for j, own in enumerate(graph.nodes):
            found[j] = expected.get(_key(own), 0.0)
        torch.testing.assert_close(graph.edges[i], found, rtol=1e-3, atol=1e-4 * float(found.abs().max()))
        torch.testing.assert_close(float(graph.totals[i]), float(target.detach()), rtol=1e-4, atol=1e-4)
    assert float(found.abs().max()) > 1e-2


def _key(node):
    if node.kind == "feature":
        return node.kind, node.layer, node.position, node.feature
    return node.kind, node.layer, node.position


@pytest.mark.parametrize("kind", BUILDS)
def test_what_enters_a_node_adds_up_to_it(tiny, kind):
    graph = whole(tiny(kind))
    targets = [*graph.of_kind("feature"), *graph.of_kind("logit")]
    made = graph.edges[targets].sum(1) + graph.biases[targets]
    size = graph.edges[targets].abs().amax(1).maximum(graph.totals[targets].abs())
    assert float(((made - graph.totals[targets]).abs() / size).max()) < 1e-4
    assert graph.sum_error < 1e-4
    assert float(graph.left_out.abs().max()) == 0
    rest = sorted({*range(len(graph))} - {*targets})
    assert not graph.edges[rest].any()


@pytest.mark.parametrize("kind", ["mamba", "jamba", "gemma3n_text", "rwkv", "bert"])
def test_models_that_have_no_such_graph_are_refused_by_name(tiny, kind):
    model = tiny(kind)
    with pytest.raises(Unavailable, match=model.model_class):
        attribution_graph(model, transcoders_of(model), IDS, progress=False)


def test_a_feed_forward_that_returns_the_stream_as_well_is_refused(tiny):
    model = tiny("bloom")
    transcoders = transcoders_of(model)
    transcoders[1] = Dictionary(*_parts(transcoders[1]), reads="mlps_input[1]", writes="mlps_output[1]")
    with pytest.raises(ValueError, match=r"mlp_contributions\[1\]"):
        attribution_graph(model, transcoders, IDS, progress=False)


def _parts(own):
    return own.encoder, own.encoder_bias, own.decoder, own.decoder_bias, own.activation, own.input_bias


def test_a_graph_that_does_not_sum_up_is_refused(tiny):
    """Something writes into the stream beside the parts that are known."""
    model = tiny("llama")
    block = model._module.model.layers[1]
    handle = block.register_forward_hook(lambda m, args, output: output + 0.3 * torch.ones_like(output).cumsum(-1))
    try:
        with pytest.raises(Unavailable, match="do not add up"):
            attribution_graph(model, transcoders_of(model), IDS, progress=False)
    finally:
        handle.remove()


def test_rows_do_not_depend_on_the_batch(tiny):
    model = tiny("gemma2")
    alone = attribution_graph(model, transcoders_of(model, skip=True), IDS, batch_size=3, progress=False)
    torch.testing.assert_close(alone.edges, whole(model).edges, atol=1e-5, rtol=1e-3)
    assert alone.about["cost"]["backwards"] >= len(alone.of_kind("feature"))


def test_features_beyond_the_most_are_left_out_and_counted(tiny):
    model = tiny("gpt2")
    full = whole(model)
    graph = attribution_graph(model, transcoders_of(model, skip=True), IDS, max_features=60, progress=False)
    assert len(graph.of_kind("feature")) == 60
    assert graph.active == len(full.of_kind("feature"))
    assert 0 < graph.left_out_share < 1
    assert float(graph.sums().max()) < 1e-4
    at = [full.index(node) for node in graph.nodes]
    torch.testing.assert_close(graph.edges, full.edges[at][:, at], atol=1e-5, rtol=1e-3)
    gone = sorted({*full.of_kind("feature")} - {*at})
    targets = [i for i, node in enumerate(graph.nodes) if node.kind in ("feature", "logit")]
    missing = full.edges[[at[i] for i in targets]][:, gone]
    torch.testing.assert_close(graph.left_out[targets], missing.sum(1), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(graph.left_out_size[targets], missing.abs().sum(1), atol=1e-4, rtol=1e-3)
    kept = full.influence[at][: len(graph.of_kind("feature"))].mean()
    assert kept > 2 * full.influence[gone].mean()


def test_positions_and_layers_that_are_errors(tiny):
    model = tiny("llama")
    some = {layer: own for layer, own in transcoders_of(model, skip=True).items() if layer != 1}
    graph = attribution_graph(model, some, IDS, errors_at=0, progress=False)
    features = [node for node in graph.nodes if node.kind == "feature"]
    assert all(node.position > 0 and node.layer != 1 for node in features)
    assert len(graph.of_kind("error")) == model.num_layers * len(IDS)
    assert graph.sum_error < 1e-4
    assert validate_graph(model, some, graph, factor=0.999, n=3, progress=False).correlation("frozen", "logit") > 0.999


def test_targets(tiny):
    model = tiny("cohere")
    transcoders = transcoders_of(model, skip=True)
    graph = attribution_graph(model, transcoders, IDS, [3, (3, [8, 9])], progress=False)
    a, b = (graph.nodes[i] for i in graph.of_kind("logit"))
    assert (a.feature, b.feature, b.probability) == (3, 3, None)
    slow = Slow(model, "cohere", transcoders, IDS)
    difference = slow.logits[3] - (slow.logits[8] + slow.logits[9]) / 2
    assert float(graph.totals[-1]) == pytest.approx(float(difference), abs=1e-4)
    assert float(graph.totals[-2]) == pytest.approx(float(slow.logit(3)), abs=1e-4)
    chosen = attribution_graph(model, transcoders, IDS, max_logits=4, probability=1.0, progress=False)
    expected = slow.logits.softmax(-1).topk(4)
    assert [chosen.nodes[i].feature for i in chosen.of_kind("logit")] == expected.indices.tolist()
    assert chosen.weights[chosen.of_kind("logit")].tolist() == pytest.approx(expected.values.tolist(), rel=1e-4)


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
    from nnterp.interventions import GraphNode

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


# What is refused, and what is kept


def test_arguments(tiny):
    model = tiny("llama")
    transcoders = transcoders_of(model)
    with pytest.raises(ValueError, match="one prompt"):
        attribution_graph(model, transcoders, [IDS, IDS])
    with pytest.raises(ValueError, match="empty"):
        attribution_graph(model, {}, IDS)
    with pytest.raises(ValueError, match="list of 2"):
        attribution_graph(model, [transcoders[0], transcoders[1]], IDS)
    with pytest.raises(ValueError, match="another layer"):
        attribution_graph(model, {0: transcoders[1]}, IDS)
    with pytest.raises(TypeError, match="no Dictionary"):
        attribution_graph(model, {0: torch.zeros(3)}, IDS)
    with pytest.raises(ValueError, match="layers 0 to"):
        attribution_graph(model, {99: transcoders[1]}, IDS)
    with pytest.raises(ValueError, match="max_features"):
        attribution_graph(model, transcoders, IDS, max_features=0)
    with pytest.raises(ValueError, match="probability"):
        attribution_graph(model, transcoders, IDS, probability=2)
    with pytest.raises(RemoteModelError):
        attribution_graph(model, transcoders, IDS, remote=True)
    with pytest.raises(KeyError, match="no node"):
        whole(model).index("L9 F9 @9")
    with pytest.raises(ValueError, match="no feature"):
        validate_graph(model, transcoders, whole(model), ["L0 error @1"])
    with pytest.raises(InsideTraceError), model.trace(torch.tensor([IDS])):
        attribution_graph(model, transcoders, IDS)
    silent = {
        0: Dictionary(
            torch.zeros(3, model.hidden_size),
            -torch.ones(3),
            torch.zeros(3, model.hidden_size),
            torch.zeros(model.hidden_size),
            Activation(),
        )
    }
    with pytest.raises(ValueError, match="no feature"):
        attribution_graph(model, silent, IDS)


def test_an_interrupted_graph_is_kept(tiny, monkeypatch):
    from nnterp.interventions._graphs import _replaced

    model, calls = tiny("llama"), []
    real = _replaced.edges_from

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(_replaced, "edges_from", interrupted)
    with pytest.raises(KeyboardInterrupt) as caught:
        attribution_graph(model, transcoders_of(model, skip=True), IDS, batch_size=16, progress=False)
    part = caught.value.partial
    assert len(part.of_kind("feature")) + len(part.of_kind("logit")) == 48
    assert float(part.sums().max()) < 1e-4


def test_the_model_is_left_as_it_was():
    model = StandardizedTransformer(tiny_model("gpt2"), tokenizer=tiny_tokenizer())
    model.prepare()
    module = model._module
    wanted = [p.requires_grad for p in module.parameters()]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in module.modules()]
    with torch.no_grad():
        before = module(input_ids=torch.tensor([IDS])).logits
    with torch.inference_mode():
        graph = attribution_graph(model, transcoders_of(model), IDS, max_features=5, progress=False)
    assert not graph.edges.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(module(input_ids=torch.tensor([IDS])).logits, before, rtol=0, atol=0)
    assert [p.requires_grad for p in module.parameters()] == wanted
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in module.modules()] == hooks


def test_half_precision(tiny):
    model = StandardizedTransformer(tiny_model("llama").to(torch.bfloat16), tokenizer=tiny_tokenizer())
    graph = attribution_graph(model, transcoders_of(model), IDS, max_features=8, progress=False)
    assert graph.edges.dtype == torch.float32
    assert 0 < graph.sum_error < 0.2


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


def test_transcoders_that_scale_each_activation_are_refused(tiny):
    model = tiny("llama")
    own = transcoders_of(model)[0]
    scaled = Dictionary(*_parts(own), reads="mlps_input[0]", writes="mlps_output[0]", scaling=UnitVariance())
    with pytest.raises(Unavailable, match="scales each activation"):
        attribution_graph(model, {0: scaled}, IDS)


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
    assert len(names["japan"]) == 13
    changes = [float(own[0, -1]) for own in (names["turned"].predicted, names["turned"].frozen, names["turned"].model)]
    assert changes == pytest.approx([-1.02, -1.04, -1.11], abs=0.01)  # as the page says


def test_a_countrys_features_carry_its_capital(toy):
    """Features that are active for one country alone, found in graphs, and steered in both models."""
    import nnterp

    transcoders = {layer: nnterp.toy_dictionary(f"transcoder_{layer}") for layer in (3, 4, 5)}
    capitals = {"France": " Paris", "Italy": " Rome", "Spain": " Madrid", "Germany": " Berlin", "Japan": " Tokyo"}
    graphs = {
        country: attribution_graph(toy, transcoders, f"The capital of {country} is", capital, progress=False)
        for country, capital in capitals.items()
    }
    assert max(graph.sum_error for graph in graphs.values()) < 1e-4
    seen = {
        country: {(node.layer, node.feature) for node in graph.nodes if node.kind == "feature" and node.position >= 3}
        for country, graph in graphs.items()
    }
    predicted, frozen, model = [], [], []
    for country, graph in graphs.items():
        own = seen[country] - set().union(*(found for other, found in seen.items() if other != country))
        nodes = [node for node in graph.nodes if node.kind == "feature" and (node.layer, node.feature) in own]
        assert len(nodes) > 10
        found = validate_graph(toy, transcoders, graph, [nodes], factor=-1.0, progress=False)
        for changes, value in ((predicted, found.predicted), (frozen, found.frozen), (model, found.model)):
            changes.append(float(value[0, -1]))
    predicted, frozen, model = (torch.tensor(own) for own in (predicted, frozen, model))
    assert float(predicted.max()) < -0.3
    assert float(frozen.max()) < -0.3
    assert float(model.max()) < -0.1
    assert float(torch.corrcoef(torch.stack([predicted, frozen]))[0, 1]) > 0.9
    assert float(torch.corrcoef(torch.stack([predicted, model]))[0, 1]) > 0.8
