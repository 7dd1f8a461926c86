"""Edge attribution, circuits and faithfulness against plain torch hooks and autograd on HuggingFace's modules."""

from __future__ import annotations

import math
import re
import runpy
import warnings
from pathlib import Path

import pytest
import torch

from nnterp import StandardizedTransformer
from nnterp.errors import InsideTraceError, Unavailable
from nnterp.interventions import Circuit, edge_attribution, faithfulness, kl_divergence, logit_difference
from nnterp.interventions._circuits._connected import connected, random_circuit
from nnterp.testing import tiny_model, tiny_tokenizer

from .hooked import gradients_of_weights
from .slow_circuits import BUILDS, Slow

CLEAN, CORRUPTED = [5, 9, 12, 7, 30, 22, 17], [5, 9, 40, 7, 30, 33, 17]
OTHER_CLEAN, OTHER_CORRUPTED = [11, 42, 57, 93], [11, 31, 57, 18]
BOTH = ([CLEAN, OTHER_CLEAN], [CORRUPTED, OTHER_CORRUPTED])
SIZES = (0.0, 0.05, 0.2, 0.5, 1.0)

# Types that the slow loop does not speak of: state spaces, hybrids, latent attention. The others are in `MORE`.
FURTHER = ("mamba", "jamba", "deepseek_v3", "falcon_h1")


def linear(model):
    """A metric that any logits move."""
    readout = torch.randn(model.vocab_size, generator=torch.Generator().manual_seed(0))
    return lambda logits: logits.float() @ readout.to(logits.device)


def scores_of(circuit, pair=None):
    values = circuit.scores if pair is None else circuit.by_pair[pair]
    return {(str(e.sender), str(e.receiver)): float(s) for e, s in zip(circuit.edges, values.tolist(), strict=True)}


def expected_scores(slow, metric, into, source, points=0):
    """EAP of one pair by autograd over hooks; EAP-IG with `points` above 0."""
    (_, own, _), (_, theirs, _) = slow.plain(into), slow.plain(source)
    if points:
        embed = slow.module.get_input_embeddings()
        start, end = (embed(torch.tensor([ids])).detach() for ids in (into, source))
        parts = [start + (k + 0.5) / points * (end - start) for k in range(points)]
        each = [slow.gradients(into, metric, part) for part in parts]
        slopes = {name: sum(one[name] for one in each) / points for name in each[0]}
    else:
        slopes = slow.gradients(into, metric)
    return {
        (sender, name): float(((theirs[sender] - own[sender]) * slope).sum())
        for name, slope in slopes.items()
        for sender in own
    }


@pytest.fixture(params=BUILDS)
def kind(request):
    return request.param


def close(found, expected):
    """Scores, by the names of their edges; `expected` may hold pairs of names that are no edges."""
    a = torch.tensor(list(found.values()))
    b = torch.tensor([expected[edge] for edge in found])
    torch.testing.assert_close(a, b, atol=1e-4 * float(b.abs().max()), rtol=1e-3)
    assert float(b.abs().max()) > 0.1


@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_scores_are_those_of_autograd_over_hooks(tiny, kind, direction):
    model = tiny(kind)
    slow, metric = Slow(model, kind), linear(model)
    into, source = (CLEAN, CORRUPTED) if direction == "noising" else (CORRUPTED, CLEAN)
    found = edge_attribution(model, CLEAN, CORRUPTED, metric, direction=direction, audit=0)
    close(scores_of(found), expected_scores(slow, metric, into, source))
    assert len(found) == found.total == len(set(scores_of(found)))
    assert "not audited" in repr(found)


def test_the_edges_are_those_before_each_reader(tiny, kind):
    model = tiny(kind)
    found = edge_attribution(model, CLEAN, CORRUPTED, linear(model), audit=0)
    parallel = BUILDS[kind].parallel
    heads, layers = model.num_heads, model.num_layers
    for edge in found.edges:
        u, v = edge.sender, edge.receiver
        assert (
            v.role == "logits"
            or u.role == "embeddings"
            or u.layer < v.layer
            or (u.layer == v.layer and u.role == "head" and v.role == "mlp" and not parallel)
        )
    readers = layers * (heads + 2 * model.num_kv_heads)
    before = [1 + layer * (heads + 1) for layer in range(layers)]
    expected = sum(before) * readers // layers + sum(b + (0 if parallel else heads) for b in before)
    assert found.total == expected + 1 + layers * (heads + 1)


def test_integrated_scores_are_the_mean_over_steps(tiny, kind):
    model = tiny(kind)
    slow, metric = Slow(model, kind), linear(model)
    found = edge_attribution(model, CLEAN, CORRUPTED, metric, "integrated", steps=3, audit=0)
    close(scores_of(found), expected_scores(slow, metric, CLEAN, CORRUPTED, 3))


def test_pairs_are_scored_alone_and_averaged(tiny):
    model = tiny("llama")
    metric = linear(model)
    found = edge_attribution(model, *BOTH, metric, audit=0, by_pair=True)
    alone = [scores_of(edge_attribution(model, c, k, metric, audit=0)) for c, k in zip(*BOTH, strict=True)]
    for pair in range(2):
        close(scores_of(found, pair), alone[pair])
    close(scores_of(found), {edge: (alone[0][edge] + alone[1][edge]) / 2 for edge in alone[0]})
    again = edge_attribution(model, *BOTH, metric, audit=0, batch_size=1)
    close(scores_of(again), scores_of(found))
    assert again.by_pair is None


def test_the_metric_is_bound_to_its_pair(tiny):
    model = tiny("gpt2")
    both = edge_attribution(model, *BOTH, logit_difference([3, 4], [5, 6]), audit=0, by_pair=True)
    second = edge_attribution(model, OTHER_CLEAN, OTHER_CORRUPTED, logit_difference(4, 6), audit=0)
    close(scores_of(both, 1), scores_of(second))
    divergence = edge_attribution(model, *BOTH, kl_divergence(), "integrated", steps=2, audit=0)
    assert divergence.scores.abs().max() > 0


def test_the_audit_patches_single_edges(tiny, kind):
    model = tiny(kind)
    slow, metric = Slow(model, kind), linear(model)
    found = edge_attribution(model, CLEAN, CORRUPTED, metric, audit=8)
    every, plain = set(scores_of(found)), float(metric(slow.plain(CLEAN)[0][None])[0])
    assert len(found.audit) == 8
    exact = [
        float(metric(slow.cut(CLEAN, CORRUPTED, every - {(cell["sender"], cell["receiver"])})[None])[0]) - plain
        for cell in found.audit.cells
    ]
    torch.testing.assert_close(found.audit.exact, torch.tensor(exact).double(), atol=2e-3, rtol=1e-3)
    assert "audited: 8 exact" in repr(found)
    assert max(map(abs, exact)) > 0.1


def test_edges_into_the_logits_are_exact_up_to_the_last_norm(tiny):
    """With a metric of the stream itself there is nothing to approximate: the audit must agree."""
    model = tiny("gpt2")
    found = edge_attribution(model, CLEAN, CORRUPTED, linear(model), audit=30)
    into = [cell for cell in found.audit.cells if cell["receiver"] == "logits"]
    assert into
    for cell in into:
        assert cell["estimate"] == pytest.approx(cell["exact"], rel=0.25, abs=0.2)


def test_a_run_with_edges_cut_is_the_slow_one(tiny, kind):
    model = tiny(kind)
    slow, metric = Slow(model, kind), linear(model)
    circuit = edge_attribution(model, *BOTH, metric, audit=0)
    found = faithfulness(model, circuit, *BOTH, metric, SIZES, controls=1, seed=4)
    for k, size in enumerate(SIZES):
        own = circuit.top(math.floor(size * circuit.total))
        assert int(found["edges"][k]) == len(own)
        random = random_circuit(circuit.writers, circuit.inputs, circuit.kept, len(own), 4)
        names = {(str(circuit.writers[w]), str(circuit.inputs[i])) for i, w in random.nonzero().tolist()}
        for pair, (clean, corrupted) in enumerate(zip(*BOTH, strict=True)):
            for scores, kept in ((found["by_prompt"], set(scores_of(own))), (found["random_by_prompt"][0], names)):
                expected = float(metric(slow.cut(clean, corrupted, kept)[None])[0])
                assert float(scores[pair, k]) == pytest.approx(expected, abs=5e-3, rel=1e-4)
    torch.testing.assert_close(found["by_prompt"][:, 0], found["corrupted"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found["by_prompt"][:, -1], found["clean"], atol=1e-4, rtol=1e-5)
    assert (found["clean"] - found["corrupted"]).abs().min() > 0.1


def check_ends(model, circuit, found, metric):
    """Scores add up to the whole change; a run with all edges cut is the corrupted one, with none cut HuggingFace's.

    Args:
        circuit, found: What `edge_attribution` and `faithfulness` return for `BOTH`; sizes from 0 to 1.
    """
    assert circuit.completeness < 1e-5
    by_reader = torch.zeros(len(circuit.inputs)).index_add(0, circuit.receivers, circuit.scores)
    assert by_reader.abs().max() > 0
    for own, end in ((0, "corrupted"), (-1, "clean")):
        error = (found["by_prompt"][:, own] - found[end]).abs() / found[end].abs().clamp(min=1)
        assert error.max() < 1e-4
    module = model._module
    with torch.no_grad():
        plain = torch.stack([metric(module(input_ids=torch.tensor([ids])).logits[:, -1])[0] for ids in BOTH[0]])
    torch.testing.assert_close(found["clean"], plain, atol=1e-3, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*BUILDS, *FURTHER])
def test_scores_are_complete_and_runs_exact(tiny, kind):
    model = tiny(kind)
    metric = linear(model)
    circuit = edge_attribution(model, *BOTH, metric, audit=2)
    assert len(circuit.audit) == 2
    found = faithfulness(model, circuit, *BOTH, metric, (0.0, 0.1, 1.0), controls=0)
    check_ends(model, circuit, found, metric)


def test_a_bias_before_a_post_norm_is_a_node():
    """What the norm makes of it depends on its scale, and so on the run."""
    config = tiny_model("olmo2").config
    config.attention_bias = True
    torch.manual_seed(0)
    module = type(tiny_model("olmo2"))(config).eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model = StandardizedTransformer(module, tokenizer=tiny_tokenizer())
    metric = linear(model)
    circuit = edge_attribution(model, *BOTH, metric, audit=0)
    assert [str(node) for node in circuit.writers if node.role == "bias"] == [f"L{i} bias" for i in range(4)]
    assert circuit.completeness < 1e-5
    assert max(abs(edge.score) for edge in circuit.edges if edge.sender.role == "bias") > 1e-3
    found = faithfulness(model, circuit, *BOTH, metric, (0.0, 1.0), controls=1)
    torch.testing.assert_close(found["by_prompt"][:, 0], found["corrupted"], atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(found["by_prompt"][:, 1], found["clean"], atol=1e-3, rtol=1e-4)
    whole = circuit.connected()
    assert len(whole) == len(circuit)
    assert whole.dropped == 0


@pytest.mark.slow
def test_the_page_runs(tmp_path, monkeypatch):
    pytest.importorskip("networkx")
    page = (Path(__file__).parents[2] / "docs" / "circuits.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", page, flags=re.M | re.S)
    drawn = "\n".join(line for line in "\n".join(blocks).splitlines() if ".plot()" not in line)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "page.py").write_text(drawn, encoding="utf-8")
    names = runpy.run_path(str(tmp_path / "page.py"), run_name="page")
    assert names["found"].normalized[-1] == pytest.approx(1, abs=1e-4)
    assert scores_of(Circuit.load(tmp_path / "capital.json")) == scores_of(names["small"])


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("bert", "normalises the stream"),
        ("gemma4_text", "further modules"),
        ("qwen3_next", "a gate on its heads"),
        ("diffllama", "do not add up"),
        ("hy_v4", "lends"),
        ("gemma3n_text", "lends its keys and values"),
    ],
)
def test_what_does_not_decompose_is_refused(tiny, kind, reason):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = tiny(kind)
    with pytest.raises(Unavailable, match=reason):
        edge_attribution(model, CLEAN, CORRUPTED, linear(model))


def test_refusals(tiny):
    model, metric = tiny("gpt2"), linear(tiny("gpt2"))
    with pytest.raises(ValueError, match="Pair 0: the clean prompt has 7 tokens and the corrupted one 4"):
        edge_attribution(model, CLEAN, OTHER_CLEAN, metric)
    with pytest.raises(ValueError, match="2 clean prompts and 1 corrupted"):
        edge_attribution(model, BOTH[0], [CORRUPTED], metric)
    with pytest.raises(ValueError, match='"gradient" or "integrated"'):
        edge_attribution(model, CLEAN, CORRUPTED, metric, "exact")
    with pytest.raises(ValueError, match="steps"):
        edge_attribution(model, CLEAN, CORRUPTED, metric, "integrated", steps=0)
    with pytest.raises(ValueError, match="audit"):
        edge_attribution(model, CLEAN, CORRUPTED, metric, audit=-1)
    with pytest.raises(ValueError, match="does not depend on the logits"):
        edge_attribution(model, CLEAN, CORRUPTED, lambda logits: logits.argmax(-1).float())
    with torch.no_grad(), pytest.raises(RuntimeError, match="no_grad"):
        edge_attribution(model, CLEAN, CORRUPTED, metric)
    with model.steering(torch.ones(model.hidden_size), 1), pytest.raises(Unavailable, match="steered"):
        edge_attribution(model, CLEAN, CORRUPTED, metric)
    with pytest.raises(InsideTraceError), model.trace([CLEAN]):
        edge_attribution(model, CLEAN, CORRUPTED, metric)


def test_refusals_of_faithfulness(tiny):
    model, metric = tiny("gpt2"), linear(tiny("gpt2"))
    circuit = edge_attribution(model, CLEAN, CORRUPTED, metric, audit=0)
    with pytest.raises(ValueError, match="fractions of the model's 479 edges"):
        faithfulness(model, circuit, CLEAN, CORRUPTED, metric, sizes=[20])
    with pytest.raises(ValueError, match="asks for 239"):
        faithfulness(model, circuit.top(50), CLEAN, CORRUPTED, metric, sizes=0.5)
    with pytest.raises(ValueError, match="of another model"):
        faithfulness(tiny("llama"), circuit, CLEAN, CORRUPTED, metric)
    with pytest.raises(ValueError, match="equally long"):
        faithfulness(model, circuit, CLEAN, OTHER_CLEAN, metric)
    with pytest.raises(TypeError, match="A Circuit was expected"):
        faithfulness(model, [("a", "b")], CLEAN, CORRUPTED, metric)
    with pytest.raises(InsideTraceError), model.trace([CLEAN]):
        faithfulness(model, circuit, CLEAN, CORRUPTED, metric)


def test_what_was_computed_is_not_lost(tiny):
    model, metric = tiny("gpt2"), linear(tiny("gpt2"))
    whole = edge_attribution(model, *BOTH, metric, audit=0, by_pair=True)
    calls = []

    def failing(logits):
        calls.append(1)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return metric(logits)

    with pytest.raises(KeyboardInterrupt) as caught:
        edge_attribution(model, *BOTH, failing, audit=0, batch_size=1)
    assert caught.value.partial.about["pairs"] == [0]
    close(scores_of(caught.value.partial), scores_of(whole, 0))
    calls.clear()

    def later(logits):
        calls.append(1)
        if len(calls) > 4:
            raise KeyboardInterrupt
        return metric(logits)

    with pytest.raises(KeyboardInterrupt) as caught:
        faithfulness(model, whole, *BOTH, later, sizes=(0.1, 1.0), controls=0, batch_size=1)
    partial = caught.value.partial["by_prompt"]
    assert partial[0].isfinite().all()
    assert partial[1].isnan().all()


def test_weights_and_their_gradients_stay(tiny):
    model = tiny("gpt2")
    before = gradients_of_weights(model._module)
    edge_attribution(model, CLEAN, CORRUPTED, linear(model), audit=0)
    assert gradients_of_weights(model._module) == before


def test_choosing_edges(tiny):
    networkx = pytest.importorskip("networkx")
    model = tiny("llama")
    circuit = edge_attribution(model, CLEAN, CORRUPTED, linear(model), audit=0)
    assert (circuit.scores.abs().diff() <= 0).all()
    own = circuit.top(60)
    strongest = {(str(e.sender), str(e.receiver)) for e in circuit.edges[:60]}
    assert set(scores_of(own)) <= strongest
    assert len(own) + own.dropped == 60
    assert own.dropped > 0

    def on_a_path(edges):
        graph = networkx.DiGraph()
        for u, v in edges:
            for node in v.nodes:
                graph.add_edge(str(u), str(node))
        above = networkx.ancestors(graph, "logits") | {"logits"}
        below = networkx.descendants(graph, "embeddings") | {"embeddings"}
        return {(str(u), str(v)) for u, v in edges if str(u) in below and any(str(node) in above for node in v.nodes)}

    assert set(scores_of(own)) == on_a_path([(e.sender, e.receiver) for e in circuit.edges[:60]])
    least = float(circuit.scores[59].abs())
    assert set(scores_of(circuit.threshold(least))) == set(scores_of(own))
    assert len(circuit.top(0)) == 0
    assert circuit.top(10**9).total == len(circuit)
    with pytest.raises(KeyError, match="Nodes are called embeddings"):
        own.score("L9 H9", "logits")
    first = own.edges[0]
    assert own.score(str(first.sender), str(first.receiver)) == first.score


def test_as_a_graph_and_as_a_table(tiny):
    networkx = pytest.importorskip("networkx")
    model = tiny("llama")
    circuit = edge_attribution(model, CLEAN, CORRUPTED, linear(model), audit=0).top(60)
    graph = circuit.to_networkx()
    assert set(graph) == {str(node) for node in circuit.nodes}
    assert networkx.is_directed_acyclic_graph(graph)
    assert graph.number_of_edges() == sum(len(edge.receiver.nodes) for edge in circuit.edges)
    for edge in circuit.edges:
        for node in edge.receiver.nodes:
            assert graph[str(edge.sender)][str(node)][edge.receiver.role]["score"] == edge.score
    table = circuit.to_dataframe()
    assert list(table.score) == [edge.score for edge in circuit.edges]
    assert list(table.sender) == [str(edge.sender) for edge in circuit.edges]


def test_saved_and_loaded(tiny, tmp_path):
    model, metric = tiny("gpt2"), linear(tiny("gpt2"))
    circuit = edge_attribution(model, *BOTH, metric, audit=4, by_pair=True).top(60)
    circuit.save(tmp_path / "folder" / "circuit")
    again = Circuit.load(tmp_path / "folder" / "circuit.json")
    assert scores_of(again) == scores_of(circuit)
    assert again.audit == circuit.audit
    assert again.dropped == circuit.dropped
    assert again.nodes == circuit.nodes
    torch.testing.assert_close(again.by_pair, circuit.by_pair, atol=0, rtol=0)
    sizes = {"sizes": 0.05, "controls": 0}
    assert torch.equal(
        faithfulness(model, again, *BOTH, metric, **sizes)["metric"],
        faithfulness(model, circuit, *BOTH, metric, **sizes)["metric"],
    )
    again.save(tmp_path / "folder" / "circuit")
    (tmp_path / "mine.json").write_text('{"a": 1}')
    with pytest.raises(FileExistsError, match="holds no circuit"):
        circuit.save(tmp_path / "mine")
    assert (tmp_path / "mine.json").read_text() == '{"a": 1}'
    with pytest.raises(ValueError, match="holds no circuit"):
        Circuit.load(tmp_path / "mine")
    with pytest.raises(FileNotFoundError, match="There is no file"):
        Circuit.load(tmp_path / "nothing")


def test_random_circuits_are_connected_and_of_the_size_asked_for(tiny):
    model = tiny("gemma2")
    circuit = edge_attribution(model, CLEAN, CORRUPTED, linear(model), audit=0)
    parts = circuit.writers, circuit.inputs, circuit.kept
    seen = set()
    for size in (0, 1, 2, 3, 7, 40, circuit.total - 1, circuit.total):
        for seed in range(3):
            kept = random_circuit(*parts, size, seed)
            assert int(kept.sum()) == size
            assert torch.equal(connected(circuit.writers, circuit.inputs, kept), kept)
            assert not (kept & ~circuit.kept).any()
            assert torch.equal(kept, random_circuit(*parts, size, seed))
            if size == 40:
                seen.add(tuple(kept.flatten().nonzero()[:, 0].tolist()))
    assert len(seen) == 3


def test_areas_of_the_curve(tiny):
    model, metric = tiny("gpt2"), linear(tiny("gpt2"))
    circuit = edge_attribution(model, CLEAN, CORRUPTED, metric, audit=0)
    found = faithfulness(model, circuit, *BOTH, metric, (0.1, 0.2, 0.5, 1), controls=2)
    clean, corrupted = found["clean"].mean(), found["corrupted"].mean()
    curve = [float((m - corrupted) / (clean - corrupted)) for m in found["by_prompt"].mean(0)]
    steps = [(0.1, 0, 1), (0.3, 1, 2), (0.5, 2, 3)]
    assert found.normalized.tolist() == pytest.approx(curve, abs=1e-5)
    assert found.cpr == pytest.approx(sum(w * (curve[a] + curve[b]) / 2 for w, a, b in steps), abs=1e-5)
    assert found.cmd == pytest.approx(
        sum(w * (abs(1 - curve[a]) + abs(1 - curve[b])) / 2 for w, a, b in steps), abs=1e-5
    )
    assert found.normalized_random.shape == (2, 4)
    torch.testing.assert_close(found["random"], found["random_by_prompt"].mean(1))
    assert "CPR" in repr(found)


def test_the_circuit_of_a_capital(toy):
    clean = [f"The capital of {country} is" for country in ("France", "Japan", "Italy", "Poland")]
    corrupted = [f"The capital of {country} is" for country in ("Italy", "Poland", "France", "Japan")]
    metric = logit_difference([" Paris", " Tokyo", " Rome", " Warsaw"], [" Rome", " Warsaw", " Paris", " Tokyo"])
    circuit = edge_attribution(toy, clean, corrupted, metric, "integrated", steps=5, audit=20)
    assert circuit.completeness < 1e-5
    assert circuit.audit.rank_correlation > 0.6
    found = faithfulness(toy, circuit, clean, corrupted, metric, controls=3)
    assert found["clean"].mean() > 5
    assert found["corrupted"].mean() < -5
    half = found.labels["sizes"].index(0.1)
    assert found.normalized[half] > 0.6
    assert found.normalized[half] > found.normalized_random[:, half].max() + 0.2
    assert found.normalized[-1] == pytest.approx(1, abs=1e-4)
