"""Attribution graphs against plain torch hooks and autograd on HuggingFace's modules."""

from __future__ import annotations

import pytest
import torch

from nnterp import StandardizedTransformer
from nnterp.errors import InsideTraceError, RemoteModelError, Unavailable
from nnterp.interventions import attribution_graph, validate_graph
from nnterp.testing import tiny_model, tiny_tokenizer
from nnterp.traced import Activation, Dictionary, UnitVariance

from .slow_graphs import BUILDS, IDS, Slow, parts_of, transcoders_of, whole


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
    transcoders[1] = Dictionary(*parts_of(transcoders[1]), reads="mlps_input[1]", writes="mlps_output[1]")
    with pytest.raises(ValueError, match=r"mlp_contributions\[1\]"):
        attribution_graph(model, transcoders, IDS, progress=False)


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
    assert float(graph.totals[-1]) == pytest.approx(float(difference.detach()), abs=1e-4)
    assert float(graph.totals[-2]) == pytest.approx(float(slow.logit(3).detach()), abs=1e-4)
    chosen = attribution_graph(model, transcoders, IDS, max_logits=4, probability=1.0, progress=False)
    expected = slow.logits.softmax(-1).topk(4)
    assert [chosen.nodes[i].feature for i in chosen.of_kind("logit")] == expected.indices.tolist()
    assert chosen.weights[chosen.of_kind("logit")].tolist() == pytest.approx(expected.values.tolist(), rel=1e-4)


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
    late = Dictionary(*parts_of(transcoders[1]), reads="layers_output[1]", writes="mlps_output[1]")
    with pytest.raises(ValueError, match="computes after"):
        attribution_graph(model, {1: late}, IDS)
    with pytest.raises(ValueError, match="takes the place of no feed-forward"):
        attribution_graph(
            model, {1: Dictionary(*parts_of(late), reads="layers_output[1]", writes="layers_output[1]")}, IDS
        )
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


def test_transcoders_that_scale_each_activation_are_refused(tiny):
    model = tiny("llama")
    own = transcoders_of(model)[0]
    scaled = Dictionary(*parts_of(own), reads="mlps_input[0]", writes="mlps_output[0]", scaling=UnitVariance())
    with pytest.raises(Unavailable, match="scales each activation"):
        attribution_graph(model, {0: scaled}, IDS)
