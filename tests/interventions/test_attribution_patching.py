"""Attribution patching against torch.autograd on the plain HuggingFace model with hooks; its audit against patching."""

from contextlib import ExitStack, contextmanager

import pytest
import torch

from nnterp.errors import InsideTraceError, Unavailable
from nnterp.inputs import encode
from nnterp.interventions import (
    AttributionResult,
    Result,
    activation_patching,
    attribution_patching,
    kl_divergence,
    logit_difference,
    target_probability,
)
from nnterp.interventions._attribution._audit import Audit, audited, spearman
from nnterp.interventions._attribution._slopes import EMBEDDINGS, slopes_of
from nnterp.interventions._proving import proven_shortcuts
from nnterp.positions import last_of
from nnterp.testing import tiny_model
from nnterp.values import get_value, read_value, write_value

from .hooked import after, before, gradients_of_weights, hooked, run, value, values_of
from .reference import ARCHITECTURES, eager, hooks

CLEAN = [[11, 42, 57, 93, 130, 200], [60, 77, 101, 15]]
CORRUPTED = [[11, 42, 99, 93, 130, 201], [60, 31, 101, 180]]
METRIC = logit_difference(5, 9)
FRANCE, ITALY = "The capital of France is", "The capital of Italy is"
PARIS = logit_difference(" Paris", " Rome")


def number(logits):
    return logits[..., 5] - logits[..., 9]


@contextmanager
def dropped(block):
    """A context in which a layer's module adds to the stream what it adds, and nothing of it has a gradient."""
    scale = block.input_residual * block.post_attention_residual if type(block).__name__.startswith("Doge") else 1
    entered = []
    with (
        before(block, lambda x: entered.append(x)),
        after(block, lambda y: y.detach() + scale * (entered[-1] - entered[-1].detach())),
    ):
        yield


def by_autograd(model, prompt, keys, metric=number, without=None):
    """Values of one prompt alone, and the gradient of its metric, by hooks that put in copies and torch.autograd; the
    contribution of the layer `without` has no gradient."""
    copies = {}

    def copy(x, key):
        copies[key] = x.clone()
        return copies[key]

    with ExitStack() as stack:
        if without is not None:
            stack.enter_context(dropped(model._module.get_submodule(model.anatomy.blocks[without].path)))
        for name, layer in keys:
            stack.enter_context(hooked(model, name, layer, lambda x, key=(name, layer): copy(x, key)))
        logits = model._module(input_ids=torch.tensor([prompt]), use_cache=False).logits[0, -1].float()
    score = metric(logits)
    slopes = torch.autograd.grad(score, list(copies.values()), allow_unused=True)
    made = {k: torch.zeros_like(x) if g is None else g for (k, x), g in zip(copies.items(), slopes, strict=True)}
    return {k: x.detach()[0] for k, x in copies.items()}, {k: g[0] for k, g in made.items()}, score.item()


def close(found, expected, scale):
    assert (found - expected).abs().max() <= 2e-4 * max(1.0, float(scale)), (found, expected)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_streams_and_contributions_equal_autograd(tiny, kind):
    """Two pairs of different lengths in one call, each against its own prompts alone."""
    model = tiny(kind)
    names = ["layers_output", "mixer_contributions"]
    layers = [0, model.num_layers - 1]
    found = attribution_patching(model, CLEAN, CORRUPTED, METRIC, names, layers, audit=0)
    assert found.axes["scores"] == ("prompts", "values", "layers", "positions")
    assert found["scores"][1, ..., 4:].isnan().all()
    for i, (clean, corrupted) in enumerate(zip(CLEAN, CORRUPTED, strict=True)):
        into, slopes, score = by_autograd(model, corrupted, [(name, layer) for name in names for layer in layers])
        for v, name in enumerate(names):
            source = values_of(model, clean, name, layers)
            for a, layer in enumerate(layers):
                each = (source[layer] - into[name, layer]) * slopes[name, layer]
                close(found["scores"][i, v, a, : len(clean)], each.sum(-1), each.abs().sum())
        assert found["corrupted"][i].item() == pytest.approx(score, abs=1e-3)
        assert found["clean"][i].item() == pytest.approx(number(run(model, clean)).item(), abs=1e-3)
    assert found["scores"].nan_to_num().abs().max() > 1e-2, "nothing has an effect"
    assert found.audit is None
    assert "not audited" in repr(found)


INSIDE = ["gpt2", "llama", "gemma2", "falcon", "gpt_neox", "opt", "qwen3", "phi3", "olmo2", "granite"]


@pytest.mark.parametrize("kind", INSIDE)
def test_heads_and_neurons_equal_autograd_in_both_directions(tiny, kind):
    model = tiny(kind)
    for name, direction in (("attention_head_outputs", "noising"), ("mlp_neurons", "denoising")):
        units, positions = [0, 3], [1, -1]
        found = attribution_patching(
            model, CLEAN, CORRUPTED, METRIC, name, [1], positions, units, direction, audit=0, batch_size=1
        )
        into, source = (CORRUPTED, CLEAN) if direction == "denoising" else (CLEAN, CORRUPTED)
        together = attribution_patching(model, CLEAN[0], CORRUPTED[0], METRIC, name, [1], direction=direction, audit=0)
        for i in range(2):
            own, slopes, _ = by_autograd(model, into[i], [(name, 1)])
            each = (value(model, source[i], name, 1) - own[name, 1]) * slopes[name, 1]
            every = each if name == "mlp_neurons" else each.sum(-1)
            for u, unit in enumerate(units):
                close(found["scores"][i, 0, u], every[positions, unit], each.abs().sum())
            if i == 0:
                close(together["scores"][0, 0], every.sum(-1), each.abs().sum())


@pytest.mark.parametrize("kind", ["gpt2", "llama", "mixtral", "bloom", "gemma3_text", "qwen3"])
def test_patterns_equal_finite_differences(kind):
    model, step = eager(kind), 0.02
    found = attribution_patching(
        model, CLEAN[0], CORRUPTED[0], METRIC, "attention_probabilities", [1], [2, -1], [0, 3], audit=0
    )
    given = value(model, CLEAN[0], "attention_probabilities", 1)
    own = value(model, CORRUPTED[0], "attention_probabilities", 1)
    for u, head in enumerate((0, 3)):
        for k, at in enumerate((2, 5)):

            def moved(factor, head=head, at=at):
                def part(x):
                    x = x.clone()
                    x[0, head, at] += factor * (given[head, at] - own[head, at]).to(x)
                    return x

                return number(run(model, CORRUPTED[0], [("attention_probabilities", 1, part)]))

            expected = (moved(step) - moved(-step)) / (2 * step)
            assert found["scores"][0, 0, u, k].item() == pytest.approx(expected.item(), rel=0.02, abs=2e-3)


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "doge"])
def test_gradients_without_a_layer_equal_a_loop_of_hooks(tiny, kind):
    """Learned positions; grouped queries, post-norms; a stream that layers multiply. Absolute estimates, one plain run
    for each layer left out, averaged over the layers that a value is not inside of."""
    model, layers = tiny(kind), [0, 2]
    every = range(model.num_layers)
    for name, heads in (("attention_head_outputs", "all"), ("layers_output", None)):
        found = attribution_patching(
            model, CLEAN, CORRUPTED, METRIC, name, layers, None, heads, graddrop=True, audit=0
        )["scores"]
        signed = attribution_patching(model, CLEAN, CORRUPTED, METRIC, name, layers, None, heads, audit=0)["scores"]
        assert (found - signed.abs()).nan_to_num().abs().max() > 1e-2, "leaving layers out makes no difference"
        for i, (clean, corrupted) in enumerate(zip(CLEAN, CORRUPTED, strict=True)):
            source = values_of(model, clean, name, layers)
            runs = {d: by_autograd(model, corrupted, [(name, layer) for layer in layers], without=d) for d in every}
            for a, layer in enumerate(layers):
                others = [d for d in every if name == "layers_output" or d != layer]
                each = [(source[layer] - runs[d][0][name, layer]) * runs[d][1][name, layer] for d in others]
                sizes = [e.sum((0, -1)).abs() if heads else e.sum(-1).abs() for e in each]
                scale = sum(e.abs().sum() for e in each)
                close(found[i, a].flatten()[: len(sizes[0])], torch.stack(sizes).mean(0), scale)
                if name != "layers_output":
                    own = runs[layer][1][name, layer]
                    assert own.abs().max() == 0, "the paper's own count: this term is 0, and n/(n - 1) leaves it out"


def test_attention_aware_gradients_without_a_layer(monkeypatch):
    """The pattern of a run with one query patched, less the old one, times the pattern's gradient by hooks."""
    model, at, plain = eager("llama"), 5, tiny_model("llama")
    plain.set_attn_implementation("eager")
    with torch.no_grad(), model.trace(torch.tensor([CLEAN[0]])):
        queries = read_value(model, get_value("attention_queries"), 1)[0].clone().save()
    new, sizes = pattern_when(model, "attention_queries", 1, CORRUPTED[0], queries[at], at), []
    for layer in (0, 2, 3):
        with dropped(plain.model.layers[layer]):
            (*_, old), (*_, slope), _ = attention_inside(monkeypatch, plain, CORRUPTED[0], 1)
        sizes.append(((new - old) * slope).sum().abs().item())
    found = attribution_patching(
        *(model, CLEAN[0], CORRUPTED[0], METRIC, "attention_queries", [1], at),
        method="attention-aware",
        graddrop=True,
        audit=0,
    )
    assert model.num_layers == 4
    assert found["scores"].item() == pytest.approx(sum(sizes) / 3, rel=2e-3, abs=1e-4)
    assert found["scores"].item() > 1e-2


def test_magnitudes_say_so_and_have_no_metric_of_patched_runs(toy, tmp_path):
    arguments = (toy, FRANCE, ITALY, PARIS, "attention_head_outputs")
    found = attribution_patching(*arguments, heads="all", graddrop=True, audit=10)
    assert (found["scores"] >= 0).all()
    assert "size of the change" in found.about["arguments"]["score"]
    for result in (found, AttributionResult.load(found.save(tmp_path / "magnitudes") or tmp_path / "magnitudes")):
        assert "without signs" in repr(result)
        assert result.audit.sign_errors == 0
        assert (result.audit.exact >= 0).all()
        with pytest.raises(ValueError, match="scores are magnitudes"):
            _ = result.patched
    signed = activation_patching(*arguments, heads="all")
    effects = (signed["scores"] - found.unpatched[:, None, None])[0].abs()
    for cell in found.audit.cells:
        assert cell["exact"] == pytest.approx(effects[cell["layers"], cell["heads"]].item(), abs=2e-3)
    assert (found.normalized()["scores"] >= 0).all()
    with pytest.raises(ValueError, match="graddrop=True goes with"):
        attribution_patching(*arguments, method="integrated", graddrop=True)
    with pytest.raises(Unavailable, match="layers_mid"):
        attribution_patching(*arguments[:4], "layers_mid", graddrop=True)


def attention_inside(monkeypatch, module, prompt, layer):
    """Queries, keys, values and the pattern of one layer as the model's own eager attention has them, and gradients."""
    import sys

    code = sys.modules[type(module).__module__]
    plain, kept = code.eager_attention_forward, []

    def watched(owner, queries, keys, values, *args, **kwargs):
        queries, keys, values = (x.clone() for x in (queries, keys, values))
        output, pattern = plain(owner, queries, keys, values, *args, **kwargs)
        kept.append((queries, keys, values, pattern, kwargs.get("scaling")))
        return output, pattern

    monkeypatch.setattr(code, "eager_attention_forward", watched)
    logits = module(input_ids=torch.tensor([prompt]), use_cache=False).logits[0, -1].float()
    monkeypatch.undo()
    assert len(kept) == module.config.num_hidden_layers
    *tensors, scaling = kept[layer]
    slopes = torch.autograd.grad(number(logits), tensors)
    return [x.detach()[0] for x in tensors], [g[0] for g in slopes], scaling


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2", "qwen3"])
def test_queries_keys_and_values_equal_autograd_and_a_loop_over_the_softmax(monkeypatch, kind):
    """Grouped queries included: llama has 4 heads over 2 of keys and values."""
    model, layer = eager(kind), 1
    plain_model = tiny_model(kind)
    plain_model.set_attn_implementation("eager")
    assert all(map(torch.equal, plain_model.state_dict().values(), model._module.state_dict().values()))
    (q, k, v, pattern), (gq, gk, gv, gp), scaling = attention_inside(monkeypatch, plain_model, CORRUPTED[0], layer)
    (q2, k2, v2, _), *_ = attention_inside(monkeypatch, plain_model, CLEAN[0], layer)
    scaling = q.shape[-1] ** -0.5 if scaling is None else scaling
    names = ["attention_queries", "attention_keys", "attention_values"]
    plain = {
        name: attribution_patching(model, CLEAN[0], CORRUPTED[0], METRIC, name, [layer], list(range(6)), "all", audit=0)
        for name in names
    }
    for name, old, new, slope in zip(names, (q, k, v), (q2, k2, v2), (gq, gk, gv), strict=True):
        expected = ((new - old) * slope).sum(-1)
        close(plain[name]["scores"][0, 0], expected, expected.abs().sum())
    group = q.shape[0] // k.shape[0]
    aware = attribution_patching(
        model, CLEAN[0], CORRUPTED[0], METRIC, names[:1], [layer], list(range(6)), "all", method="attention-aware"
    )
    keys = attribution_patching(
        model, CLEAN[0], CORRUPTED[0], METRIC, names[1], [layer], [*range(6), [2, 5]], "all", method="attention-aware"
    )
    for head in range(q.shape[0]):
        for at in range(6):
            scores = torch.stack([q2[head, at] @ k[head // group, j] * scaling for j in range(at + 1)])
            expected = (scores.softmax(0) - pattern[head, at, : at + 1]) @ gp[head, at, : at + 1]
            assert aware["scores"][0, 0, head, at].item() == pytest.approx(expected.item(), abs=1e-3, rel=1e-3)
    for own in range(k.shape[0]):
        for c, patched in enumerate([[0], [1], [2], [3], [4], [5], [2, 5]]):
            expected = torch.tensor(0.0)
            for head in range(own * group, (own + 1) * group):
                for at in range(6):
                    each = [k2[own, j] if j in patched else k[own, j] for j in range(at + 1)]
                    scores = torch.stack([q[head, at] @ key * scaling for key in each])
                    expected = expected + (scores.softmax(0) - pattern[head, at, : at + 1]) @ gp[head, at, : at + 1]
            assert keys["scores"][0, 0, own, c].item() == pytest.approx(expected.item(), abs=1e-3, rel=1e-3)
    assert not torch.allclose(aware["scores"], plain[names[0]]["scores"], atol=1e-3), "the softmax makes no difference"


def pattern_when(model, name, layer, prompt, new, at):
    """The pattern of a layer whose queries or keys are replaced at one position, read in that very run."""
    with torch.no_grad(), model.trace(torch.tensor([prompt])):
        patched = read_value(model, get_value(name), layer).clone()
        patched[:, at] = new
        write_value(model, get_value(name), patched, layer)
        pattern = read_value(model, get_value("attention_probabilities"), layer)[0].clone().save()
    return pattern


@pytest.mark.parametrize("kind", ["bloom", "opt", "gptj", "phi", "gemma3_text", "starcoder2", "stablelm", "codegen"])
def test_the_recomputed_pattern_is_that_of_a_patched_run(kind):
    """Scores with positions in them (BLOOM) too: the pattern read in a run with the patched query or key."""
    model = eager(kind)
    with torch.no_grad(), model.trace(torch.tensor([CLEAN[0]])):
        queries = read_value(model, get_value("attention_queries"), 1)[0].clone().save()
        keys = read_value(model, get_value("attention_keys"), 1)[0].clone().save()
    given = {"attention_queries": queries, "attention_keys": keys}
    slopes = model.gradients([CORRUPTED[0]], lambda logits: number(logits[0, -1]), "attention_probabilities", 1)
    slope, old = slopes["attention_probabilities", 1][0], slopes.value(("attention_probabilities", 1))[0]
    for name, new in given.items():
        found = attribution_patching(
            model, CLEAN[0], CORRUPTED[0], METRIC, name, [1], [2, -1], method="attention-aware", audit=0
        )
        for c, at in enumerate((2, 5)):
            pattern = pattern_when(model, name, 1, CORRUPTED[0], new[at], at)
            expected = ((pattern - old) * slope).sum().item()
            assert found["scores"][0, 0, c].item() == pytest.approx(expected, rel=2e-3, abs=2e-3), (name, at)


def test_scores_that_are_no_multiple_of_queries_and_keys_are_refused():
    with pytest.raises(Unavailable, match=r"layer 0 of Gemma2.*may be capped"):
        attribution_patching(
            eager("gemma2"), CLEAN, CORRUPTED, METRIC, "attention_queries", method="attention-aware", audit=0
        )
    with pytest.raises(Unavailable, match="attention sinks"):
        attribution_patching(
            eager("gpt_oss"), CLEAN, CORRUPTED, METRIC, "attention_keys", method="attention-aware", audit=0
        )

    with pytest.raises(Unavailable, match=r"later layers \(2\) of Gemma3n.* borrow the keys of layer 0"):
        attribution_patching(
            eager("gemma3n_text"), CLEAN, CORRUPTED, METRIC, "attention_keys", method="attention-aware", audit=0
        )


def test_several_streams_side_by_side(tiny):
    """Gemma 3n keeps its stream as [streams, batch, seq, hidden]."""
    model = tiny("gemma3n_text")
    found = attribution_patching(model, CLEAN[0], CORRUPTED[0], METRIC, layers=[1], audit=6)
    kept = []

    def copy(x):
        kept.append(x.clone())
        return kept[-1]

    scores = []
    for prompt in (CORRUPTED[0], CLEAN[0]):
        with hooks(model, [("layers_output", 1, copy)]):
            logits = model._module(input_ids=torch.tensor([prompt]), use_cache=False).logits[0, -1].float()
        scores.append(number(logits))
    assert kept[0].dim() == 4
    (slope,) = torch.autograd.grad(scores[0], kept[0])
    each = ((kept[1] - kept[0]) * slope).detach()
    close(found["scores"][0, 0], each.sum((0, 1, 3)), each.abs().sum())
    exact = activation_patching(model, CLEAN[0], CORRUPTED[0], METRIC, layers=[1])
    for cell in found.audit.cells:
        expected = exact["scores"][0, 0, cell["position"]] - exact["corrupted"][0]
        assert cell["exact"] == pytest.approx(expected.item(), abs=1e-3)


def integrated_by_hooks(model, into, source, name, layer, points):
    """The mean gradient over embeddings between two prompts, by a hook on the embedding and torch.autograd."""
    embed = model._module.get_submodule(model.anatomy.embed_tokens)
    ends = [embed(torch.tensor([prompt])).detach() for prompt in (into, source)]
    total = 0
    for part in points:
        mixed = (ends[0] + part * (ends[1] - ends[0])).requires_grad_(True)
        handle = embed.register_forward_hook(lambda *_, mixed=mixed: mixed)
        try:
            total = total + by_autograd(model, into, [(name, layer)])[1][name, layer]
        finally:
            handle.remove()
    return (total / len(points) * (value(model, source, name, layer) - value(model, into, name, layer))).sum(-1)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma2", "mamba", "bloom"])
def test_integrated_equals_a_loop_over_embeddings(tiny, kind):
    model = tiny(kind)
    found = attribution_patching(model, CLEAN, CORRUPTED, METRIC, layers=[0, 1], method="integrated", steps=3, audit=0)
    for i in range(2):
        for layer in (0, 1):
            expected = integrated_by_hooks(model, CORRUPTED[i], CLEAN[i], "layers_output", layer, [1 / 6, 1 / 2, 5 / 6])
            close(found["scores"][i, layer, : len(CLEAN[i])], expected, expected.abs().sum())


@pytest.mark.parametrize(
    ("metric", "direction"),
    [(PARIS, "denoising"), (kl_divergence(), "noising"), (target_probability(" Paris"), "denoising")],
)
def test_integrated_attributions_of_the_embeddings_sum_to_the_difference(toy, direction, metric):
    left = []
    for steps in (1, 4, 24):
        found = attribution_patching(
            toy, FRANCE, ITALY, metric, "layers_input", 0, None, None, direction, "integrated", steps, 0
        )
        whole = (found["clean"] - found["corrupted"]) * (1 if direction == "denoising" else -1)
        left.append(abs(float(found["scores"].sum() - whole) / float(whole)))
    assert left[2] < 0.02
    assert left[2] < left[1] < left[0]


def test_slopes_of_interpolated_embeddings(tiny):
    """What edges use: gradients by the embeddings themselves, of prompts of different lengths in one batch."""
    model = tiny("llama")
    before = gradients_of_weights(model._module)
    rows, other = encode(model, CORRUPTED), encode(model, CLEAN)
    embed = model._module.get_submodule(model.anatomy.embed_tokens)
    ends = [[embed(torch.tensor(row.ids)).detach() for row in side] for side in (rows, other)]
    mixed = [0.75 * a + 0.25 * b for a, b in zip(*ends, strict=True)]
    found = slopes_of(
        model, rows, [EMBEDDINGS], lambda logits, _: number(logits), proven_shortcuts(model), embeddings=mixed
    )
    for own, given in zip(found, mixed, strict=True):
        leaf = given[None].clone().requires_grad_(True)
        score = number(model._module(inputs_embeds=leaf, use_cache=False).logits[0, -1].float())
        (expected,) = torch.autograd.grad(score, leaf)
        torch.testing.assert_close(own.values[EMBEDDINGS], given)
        close(own.gradients[EMBEDDINGS], expected[0], expected.abs().max())
        assert own.score.item() == pytest.approx(score.item(), abs=1e-3)
    assert gradients_of_weights(model._module) == before


@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_the_audit_is_what_patching_finds(toy, direction):
    clean, corrupted = [FRANCE, "Paris is in"], [ITALY, "Rome is in"]
    common = (toy, clean, corrupted, PARIS, ["layers_output", "mlp_contributions"], [1, -1])
    found = attribution_patching(*common, direction=direction, audit=10_000)
    exact = activation_patching(*common, direction=direction)
    assert found["scores"].shape == exact["scores"].shape
    assert found.labels == exact.labels
    assert found.tokens == exact.tokens
    torch.testing.assert_close(found["clean"], exact["clean"], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.unpatched, exact["corrupted" if direction == "denoising" else "clean"])
    axes = found.axes["scores"]
    for cell in found.audit.cells:
        where = tuple(found.labels[axis].index(cell[axis]) for axis in axes)
        assert cell["estimate"] == pytest.approx(found["scores"][where].item())
        effect = exact["scores"][where] - found.unpatched[where[0]]
        assert cell["exact"] == pytest.approx(effect.item(), abs=1e-4)
    assert len(found.audit) >= 8
    expected = found["scores"] + found.unpatched.view(-1, 1, 1, 1)
    torch.testing.assert_close(found.patched, expected, equal_nan=True)
    some = attribution_patching(*common, direction=direction, audit=6, seed=3).audit
    sizes = found["scores"].abs().flatten().nan_to_num().sort(descending=True).values[:3]
    torch.testing.assert_close(some.among("top").estimates.abs(), sizes.double())
    assert len(some.among("random")) == 3
    assert some.cells == attribution_patching(*common, direction=direction, audit=6, seed=3).audit.cells
    assert some.cells[3:] != attribution_patching(*common, direction=direction, audit=6, seed=4).audit.cells[3:]


def test_the_audit_counts():
    estimates = torch.tensor([5.0, -4.0, float("nan"), 0.5, -0.4, 0.3, 0.0])
    exact = torch.tensor([4.0, 4.5, float("nan"), 0.5, -0.4, 0.0, 0.0])
    asked = []

    def measure(cells):
        asked.extend(cells)
        return exact[cells]

    found = audited(estimates, measure, lambda i: {"cell": i}, 5, seed=1)
    assert asked[:3] == [0, 1, 3]
    assert set(asked[3:]) < {4, 5, 6}
    assert [cell["chosen"] for cell in found.cells] == ["top"] * 3 + ["random"] * 2
    assert found.sign_errors == 1
    assert found.worst(1) == [{"cell": 1, "estimate": -4.0, "exact": 4.5, "chosen": "top", "error": -8.5}]
    assert "worst miss at cell 1: estimated -4, exact 4.5" in str(found)
    assert Audit.of({"audit": found.record()}) == found
    assert spearman(torch.tensor([1.0, 2, 3, 4]), torch.tensor([10.0, 30, 20, 40])) == pytest.approx(0.8)
    assert spearman(torch.tensor([1.0, 2, 2, 3]), torch.tensor([1.0, 2, 3, 4])) == pytest.approx(0.9486832980505138)
    assert spearman(torch.ones(3), torch.arange(3)) != spearman(torch.ones(3), torch.arange(3))  # NaN
    none = audited(torch.tensor([float("nan")]), measure, lambda i: {}, 5)
    assert len(none) == 0
    assert "nothing" in str(none)


def test_a_saved_result_keeps_its_audit(toy, tmp_path):
    found = attribution_patching(toy, FRANCE, ITALY, PARIS, layers=[0, 5], audit=4)
    found.save(tmp_path / "scores")
    again = Result.load(tmp_path / "scores")
    assert isinstance(again, AttributionResult)
    assert again.audit == found.audit
    assert "audited: 4 exact" in repr(again)
    parts = found.normalized()
    torch.testing.assert_close(parts["scores"], found["scores"] / (found["clean"] - found["corrupted"]))
    assert torch.isnan(attribution_patching(toy, FRANCE, FRANCE, PARIS, audit=0).normalized()["scores"]).all()


def test_prompts_of_different_lengths_by_selectors(toy):
    clean, corrupted = "The capital of France is", "The Eiffel Tower is in the city of"
    positions = [-1, last_of("The"), [0, -1]]
    found = attribution_patching(toy, clean, corrupted, PARIS, "layers_output", [2, 5], positions, audit=100)
    exact = activation_patching(toy, clean, corrupted, PARIS, "layers_output", [2, 5], positions)
    assert found.labels == exact.labels
    ids = [toy.tokenizer(text).input_ids for text in (clean, corrupted)]
    good, bad = (toy.tokenizer(token, add_special_tokens=False).input_ids[-1] for token in (" Paris", " Rome"))
    for a, layer in enumerate((2, 5)):
        key = ("layers_output", layer)
        into, slopes, _ = by_autograd(toy, ids[1], [key], lambda logits: logits[good] - logits[bad])
        change = value(toy, ids[0], *key)[-1] - into[key][-1]
        assert found["scores"][0, a, 0].item() == pytest.approx((change * slopes[key][-1]).sum().item(), abs=1e-3)
    for cell in found.audit.cells:
        where = tuple(found.labels[axis].index(cell[axis.removesuffix("s")]) for axis in found.axes["scores"])
        assert cell["exact"] == pytest.approx((exact["scores"][where] - exact["corrupted"][0]).item(), abs=1e-4)
    with pytest.raises(ValueError, match="no embeddings between"):
        attribution_patching(toy, clean, corrupted, PARIS, positions=-1, method="integrated")
    with pytest.raises(ValueError, match="axis of keys"):
        attribution_patching(eager("llama"), [[1, 2, 3]], [[1, 2]], METRIC, "attention_probabilities", heads="all")


def test_refusals(toy):
    def call(metric=PARIS, **options):
        return attribution_patching(toy, FRANCE, ITALY, metric, **options)

    with pytest.raises(ValueError, match="differentiable"):
        call(lambda logits: logits[:, 3].detach())
    with pytest.raises(ValueError, match="differentiable"):
        call(lambda logits: logits.argmax(-1).float())
    with pytest.raises(ValueError, match="one number for each run"):
        call(lambda logits: logits.sum())
    with torch.no_grad(), pytest.raises(RuntimeError, match="no_grad"):
        call()
    with torch.inference_mode(), pytest.raises(RuntimeError, match="no_grad"):
        call()
    with pytest.raises(ValueError, match="has no gradient, at the clean run"):
        call(kl_divergence(), direction="noising")
    with pytest.raises(ValueError, match="neither"):
        call(method="attention-aware")
    with pytest.raises(ValueError, match="'gradient', 'integrated', 'attention-aware'"):
        call(method="exact")
    with pytest.raises(ValueError, match="steps must be at least 1"):
        call(method="integrated", steps=0)
    with pytest.raises(ValueError, match="audit must be at least 0"):
        call(audit=-1)
    with pytest.raises(Unavailable, match="enable_attention_probs=True"):
        attribution_patching(toy, FRANCE, ITALY, PARIS, "attention_queries", method="attention-aware")
    with pytest.raises(InsideTraceError), toy.trace("a"):
        call()


def test_what_was_computed_outlives_an_error(toy):
    clean, corrupted = [FRANCE] * 3, [ITALY, "The capital of Japan is", "The capital of Spain is"]
    whole = attribution_patching(toy, clean, corrupted, PARIS, audit=0, batch_size=1)
    calls = []

    def failing(logits):
        calls.append(len(logits))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return logits[:, 7] - logits[:, 8]

    with pytest.raises(KeyboardInterrupt) as caught:
        attribution_patching(toy, clean, corrupted, failing, audit=0, batch_size=1)
    partial = caught.value.partial
    assert partial["done"].tolist() == [True, False, False]
    assert partial["scores"][1:].isnan().all()
    again = attribution_patching(toy, clean, corrupted, failing, audit=0, batch_size=1, resume=partial)
    expected = attribution_patching(
        toy, clean, corrupted, lambda logits: logits[:, 7] - logits[:, 8], audit=0, batch_size=1
    )
    torch.testing.assert_close(again["scores"], expected["scores"])
    together = attribution_patching(toy, clean, corrupted, PARIS, audit=0)
    torch.testing.assert_close(together["scores"], whole["scores"], atol=1e-3, rtol=1e-3)


def test_the_figure_has_the_signs_of_the_effects_and_says_that_they_are_estimates(toy):
    found = attribution_patching(toy, ITALY, FRANCE, PARIS, audit=0)
    heatmap = found.plot().data[0]
    scores = found["scores"][0].numpy()
    assert scores.min() < 0
    assert (heatmap.z == scores).all()
    assert heatmap.zmin == -heatmap.zmax == -abs(scores).max()
    assert colours_of(found) == "estimated change of logit difference"
    assert colours_of(found.normalized()) == "estimated part of the difference"
    assert found.plot().layout.title.text.startswith("Attribution patching of layers_output")


def colours_of(found):
    return found.plot().data[0].colorbar.title.text.replace("<br>", " ")
