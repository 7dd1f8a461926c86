"""Figures of the results that the sibling packages really return, against the numbers in them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nnterp import display, plugins
from nnterp.interventions import (
    Component,
    ablate,
    activation_patching,
    components,
    direct_logit_attribution,
    edge_attribution,
    faithfulness,
    logit_difference,
    logit_lens,
    logit_lens_table,
    patchscope_lens,
    patchscope_table,
    path_patching,
    steering_sweep,
    target_probability,
)

PROMPTS = ["The capital of France is", "The Eiffel Tower is in the city of"]


@pytest.fixture(scope="module")
def model():
    from nnterp import StandardizedTransformer
    from nnterp.testing import tiny_model, tiny_tokenizer

    return StandardizedTransformer(tiny_model("gemma2"), tokenizer=tiny_tokenizer())


@pytest.fixture(scope="module")
def lens(model):
    return logit_lens_table(model, PROMPTS, top_k=4, targets=[[42, 40], [42, 41]], progress=False)


def test_every_figure_is_registered():
    expected = {"lens", "targets", "attention", "tokens", "patching", "ablation", "paths", "probe"}
    expected |= {
        "patchscope",
        "certificate",
        "steering",
        "heads",
        "probe",
        "direct_attribution",
        "circuit",
        "faithfulness",
    }
    assert set(plugins.names(plugins.FIGURES)) >= expected
    for name in expected:
        assert callable(plugins.load(plugins.FIGURES, name))
    assert plugins.load("nnterp.writers", "figure") is display.save


@pytest.mark.parametrize("prompt", [0, 1, -1])
def test_lens_result_is_the_lens(model, lens, prompt):
    heat = lens.plot(tokenizer=model.tokenizer, prompt=prompt).data[0]
    text = PROMPTS[prompt]
    full = logit_lens(model, text, positions=slice(None), progress=False)[0]
    names = display.TokenNames(model.tokenizer)
    assert np.array(heat.z).shape == full.shape[:2]
    for i in range(full.shape[0]):
        for j in range(full.shape[1]):
            best = full[i, j].argmax()
            assert heat.z[i][j] == pytest.approx(full[i, j, best].item(), rel=1e-4)
            assert f"1. {display.escape(names(best))} " in heat.hovertext[i][j]


def test_lens_result_by_rank_entropy_and_target(model, lens):
    full = logit_lens(model, PROMPTS[0], positions=slice(None), progress=False)[0]
    ids = lens["target_ids"][0].tolist()
    rank = 10 ** np.array(lens.plot(color="rank", target=ids[0]).data[0].z)
    assert np.allclose(rank, 1 + (full > full[..., ids[0], None]).sum(-1).numpy())
    last = full.gather(-1, full[-1].argmax(-1)[None, :, None].expand(len(full), -1, -1))
    assert np.allclose(10 ** np.array(lens.plot(color="rank").data[0].z), 1 + (full > last).sum(-1).numpy())
    figure = lens.plot(color="kl")
    kl = torch.nn.functional.kl_div(full.log(), full[-1:].expand_as(full), reduction="none").sum(-1)
    assert np.allclose(figure.data[0].z, kl, atol=1e-5)
    assert figure.data[0].colorbar.title.text.replace("<br>", " ") == f"KL from layer {len(full) - 1} (nats)"
    assert f"KL from layer {len(full) - 1} {kl[0, 1]:.3f} nats" in figure.data[0].hovertext[0][1]
    entropy = np.array(lens.plot(color="entropy").data[0].z)
    assert np.allclose(entropy, -(full * full.log()).sum(-1).numpy(), rtol=1e-4)
    target = np.array(lens.plot(target=40).data[0].z)
    assert np.allclose(target, full[..., 40].numpy(), rtol=1e-4)
    with pytest.raises(ValueError, match="Token 77 is not among the targets of prompt 0"):
        lens.plot(target=77)
    with pytest.raises(ValueError, match="color must be"):
        lens.plot(color="red")
    with pytest.raises(ValueError, match="layers has 1 entries, but the layer axis of the result"):
        lens.plot(layers=[0])
    with pytest.raises(ValueError, match="tokens has 2 entries, but the column axis of the result"):
        lens.plot(tokens=["a", "b"])
    words = [f"w{i}" for i in range(len(lens.tokens[0]) - lens.tokens[0].count(None))]
    assert list(lens.plot(tokens=words).layout.xaxis.ticktext) == words
    with pytest.raises(IndexError, match="there is no prompt 2"):
        lens.plot(prompt=2)
    with pytest.raises(ValueError, match="has no target_ranks"):
        logit_lens_table(model, PROMPTS[0], progress=False).plot(color="rank", target=40)
    with pytest.raises(ValueError, match=r"has no last_ranks.*against_last=True"):
        logit_lens(model, PROMPTS[0], top_k=2, positions=slice(None), progress=False).plot(color="rank")
    with pytest.raises(ValueError, match="holds the 4 top tokens of each cell, not 5"):
        lens.plot(top_k=5)


def test_lens_result_without_positions_has_a_column_per_prompt(model):
    result = logit_lens(model, PROMPTS, top_k=2, progress=False)
    heat = result.plot().data[0]
    full = logit_lens(model, PROMPTS, progress=False)
    assert np.allclose(heat.z, full.max(-1).values.T)


def test_target_curves_of_a_lens(model, lens):
    figure = display.plot_targets(lens, band=None)
    full = [logit_lens(model, text, progress=False)[0] for text in PROMPTS]
    ids = lens["target_ids"]
    for place, line in enumerate(figure.data):
        mean = torch.stack([full[p][:, ids[p, place]] for p in range(2)]).mean(0)
        assert np.allclose(line.y, mean, rtol=1e-4)


def test_run_prompts_draws(model):
    from nnterp.prompts import Prompt, run_prompts

    prompts = [Prompt(text, {"target": [40, 41], "other": [50]}) for text in PROMPTS]
    results = run_prompts(model, prompts, get_probs_func=logit_lens, tqdm=None)
    figure = display.plot_targets(results, band=None)
    assert np.allclose(figure.data[0].y, results["target"].mean(0))
    assert np.allclose(figure.data[1].y, results["other"].mean(0))


def test_patchscope_result_is_the_patchscope(model):
    result = patchscope_table(model, PROMPTS, top_k=2, progress=False)
    table = result.plot(tokenizer=model.tokenizer).data[0]
    full = patchscope_lens(model, PROMPTS, progress=False)
    names = display.TokenNames(model.tokenizer)
    for source in range(2):
        for layer in range(full.shape[1]):
            best = full[source, layer].argmax().item()
            first = table.cells.values[1 + source][full.shape[1] - 1 - layer].split("<br>")[0]
            assert first.startswith(display.escape(names(best)))
            assert first.endswith(f"{full[source, layer, best]:.2f}")


def test_patching_result_by_position_and_by_head(model):
    clean = model.tokenizer("The capital of France is")["input_ids"]
    corrupted = [*clean[:3], clean[3] + 1, *clean[4:]]
    metric = target_probability(40)
    result = activation_patching(model, clean, corrupted, metric, progress=False)
    heat = result.plot().data[0]
    assert np.allclose(heat.z, result["scores"][0], equal_nan=True)
    assert "position 0  The" in heat.hovertext[0][0]
    both = activation_patching(
        model, [clean] * 2, [corrupted] * 2, metric, values=["layers_output", "mlp_contributions"], progress=False
    )
    with pytest.raises(ValueError, match=r"2 prompts: draw one with prompt=i, i from 0 to 1, or their mean"):
        both.plot(values="mlp_contributions")
    chosen = both.plot(values="mlp_contributions", prompts="mean")
    assert np.allclose(chosen.data[0].z, both["scores"][:, 1].nanmean(0))
    assert "mean over 2 prompts" in chosen.layout.title.text.replace("<br>", " ")
    with pytest.raises(ValueError, match="is not among the values"):
        both.plot(values="nothing", prompts="mean")
    with pytest.raises(ValueError, match="has no axis 'banana'"):
        both.plot(banana=1)
    heads = activation_patching(
        model, clean, corrupted, metric, values="attention_head_outputs", heads="all", progress=False
    )
    figure = heads.plot()
    assert np.allclose(figure.data[0].z, heads["scores"][0])
    assert figure.layout.xaxis.title.text == "head"


def test_ablation_of_heads_is_a_map_of_what_changes(model):
    heads = components(model, "attention_head_outputs", [0, 2], "all")
    result = ablate(model, PROMPTS, heads, "mean", target_probability(40), progress=False)
    change = result["scores"] - result["baseline"][:, None]
    figure = result.plot(prompts=PROMPTS[1])
    assert np.allclose(figure.data[0].z, change[1].view(2, -1), atol=1e-7)
    assert figure.layout.xaxis.title.text == "head"
    assert list(figure.layout.yaxis.ticktext) == ["0", "2"]
    assert "change of target probability" in figure.data[0].hovertext[1][2]
    assert figure.data[0].hovertext[1][2].startswith("layer 2<br>head 2<br>")
    assert figure.layout.title.text.replace("<br>", " ").startswith("Ablation (mean, prompt The Eiffel Tower")
    assert result.plot(prompt=1) == figure
    assert np.allclose(result.plot(prompt=-2).data[0].z, change[0].view(2, -1), atol=1e-7)
    mean = result.plot(prompts="mean")
    assert np.allclose(mean.data[0].z, change.mean(0).view(2, -1), atol=1e-7)
    with pytest.raises(ValueError, match=r"2 prompts: draw one with prompt=i, i from 0 to 1, or their mean"):
        result.plot()


def test_ablation_of_several_kinds_and_of_sets(model):
    parts = components(model, "mixer_contributions") + components(model, "mlp_contributions")
    result = ablate(model, PROMPTS[0], parts, progress=False)
    figure = result.plot()
    assert np.allclose(figure.data[0].z, result["scores"][0].view(2, -1).T, atol=1e-6)
    assert list(figure.layout.xaxis.ticktext) == ["mixer", "mlp"]
    assert figure.layout.xaxis.title.text == "part (contributions)"
    sets = [[Component("mixer_contributions", 1), Component("mlp_contributions", 1)], Component("mlps_output", 0)]
    bars = ablate(model, PROMPTS[0], sets, progress=False)
    figure = bars.plot()
    assert np.allclose(figure.data[0].x, bars["scores"][0], atol=1e-6)
    assert list(figure.layout.yaxis.ticktext)[1] == "mlps_output[0]"
    assert figure.data[0].hovertext[0].startswith("mixer_contributions[1] and mlp_contributions[1]<br>change of kl")


@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_paths_are_measured_from_the_run_patched_into(model, direction):
    clean = model.tokenizer("The capital of France is")["input_ids"]
    corrupted = [*clean[:3], clean[3] + 1, *clean[4:]]
    senders = [Component("mlps_output", 0), Component("attention_head_outputs", 1, 2, positions=-1)]
    result = path_patching(
        model, clean, corrupted, senders, "logits", target_probability(40), direction=direction, progress=False
    )
    into = result["corrupted" if direction == "denoising" else "clean"]
    figure = result.plot()
    assert np.allclose(figure.data[0].x, result["scores"][0] - into, atol=1e-7)
    assert list(figure.layout.yaxis.ticktext) == ["mlps_output[0]", "attention_head_outputs[1] head 2 at -1"]


def test_circuit_and_faithfulness_of_results(model):
    clean, corrupted = [[5, 9, 12, 7], [3, 4, 5, 6]], [[5, 9, 40, 7], [3, 9, 5, 8]]
    circuit = edge_attribution(model, clean, corrupted, logit_difference(40, 41), audit=0)
    figure = display.plot_circuit(circuit.top(60), edges=10)
    kept = circuit.top(60)
    total = sum(len(edge.receiver.nodes) for edge in kept.edges)
    assert f"the 10 strongest of {total} edges" in figure.layout.title.text.replace("<br>", " ")
    hover = next(trace for trace in figure.data if trace.name == "edges").hovertext
    first = kept.edges[0]
    assert len(hover) == 10
    assert hover[0].startswith(f"{first.sender} → {first.receiver}<br>")
    found = faithfulness(model, circuit, clean, corrupted, logit_difference(40, 41), (0.1, 0.5, 1.0), controls=2)
    curves = display.plot_faithfulness(found).data
    assert [trace.name for trace in curves] == ["random circuits", "random circuits", "circuit"]
    assert np.allclose(curves[2].y, found.normalized)
    assert np.allclose(curves[0].y, found.normalized_random[0])
    assert np.allclose(curves[2].x, [0.1, 0.5, 1.0])


def test_steering_sweep_is_effect_against_damage(model):
    vector = torch.linspace(-1, 1, model.hidden_size)
    factors = [2.0, -1.0, 1.0]
    result = steering_sweep(
        model,
        vector,
        PROMPTS,
        target_probability(40),
        layers=[1, 2],
        factors=factors,
        damage={"kl": PROMPTS, "perplexity": PROMPTS},
    )
    figure = result.plot()
    assert [trace.name for trace in figure.data] == ["1", "2"]
    order = [1, 2, 0]
    for i in range(2):
        assert np.allclose(figure.data[i].x, result["kl"][i, order])
        assert np.allclose(figure.data[i].y, result["effect"][i, order])
        assert figure.data[i].hovertext[0].startswith(f"layer {i + 1}, factor -1.0<br>change of target probability")
    assert figure.layout.xaxis.title.text == "KL from the plain model (nats)"
    other = result.plot(damage="perplexity")
    assert np.allclose(other.data[0].x, result["perplexity"][0, order])
    assert other.layout.shapes[0].x0 == pytest.approx(result["plain_perplexity"].item())
    with pytest.raises(ValueError, match="measured kl, perplexity"):
        result.plot(damage="length")


def test_direct_attribution_of_heads_is_a_map_with_the_rest_of_each_layer(model):
    result = direct_logit_attribution(model, PROMPTS, (40, 41), "head")
    figure = display.plot_direct_attribution(result, prompt=1)
    named = dict(zip(result.labels["parts"], result["scores"][1].tolist(), strict=True))
    z = np.array(figure.data[0].z)
    assert z.shape == (model.num_layers, model.num_heads + 1)
    for layer in range(model.num_layers):
        assert z[layer, 2] == pytest.approx(named[f"L{layer}.H2"], abs=1e-6)
        assert z[layer, -1] == pytest.approx(named[f"L{layer} mlp"], abs=1e-6)
    assert list(figure.layout.xaxis.ticktext)[-1] == "mlp"
    assert figure.layout.title.text.replace("<br>", " ").startswith(
        "Direct attribution of the logit difference (prompt The Eiffel"
    )
    assert f"embeddings {display._arrays.number(named['embeddings'])}" in figure.layout.title.text.replace("<br>", " ")
    mean = display.plot_direct_attribution(result, prompts="mean")
    grid = result.grid().mean(0).numpy()
    assert np.allclose(np.array(mean.data[0].z)[:, : model.num_heads], grid, atol=1e-6)
    with pytest.raises(ValueError, match="2 prompts: draw one"):
        display.plot_direct_attribution(result)


def test_direct_attribution_of_other_parts(model):
    by_layer = direct_logit_attribution(model, PROMPTS[0], 40, "layer")
    bars = display.plot_direct_attribution(by_layer).data[0]
    assert np.allclose(bars.x, by_layer["scores"][0], atol=1e-7)
    by_sublayer = direct_logit_attribution(model, PROMPTS[0], 40, "sublayer")
    cells = display.plot_direct_attribution(by_sublayer).data[0]
    assert np.allclose(cells.z, by_sublayer.grid()[0], atol=1e-7)
    by_neuron = direct_logit_attribution(model, PROMPTS[0], 40, "neuron")
    figure = display.plot_direct_attribution(by_neuron, most=12)
    largest = by_neuron["scores"][0].abs().sort(descending=True).values[:12]
    assert np.allclose(sorted(np.abs(figure.data[0].x)), sorted(largest.numpy()), atol=1e-7)
    assert "the 12 largest of" in figure.layout.title.text.replace("<br>", " ")
    with pytest.raises(ValueError, match="most is the number of bars"):
        display.plot_direct_attribution(by_neuron, most=0)


def test_direct_attribution_of_plain_numbers_and_positions(model):
    figure = display.plot_direct_attribution(torch.tensor([1.0, -2.0]), ["<b>a</b>", "c"], score="nats")
    assert list(figure.data[0].x) == [1.0, -2.0]
    assert figure.data[0].hovertext[0] == "&lt;b&gt;a&lt;/b&gt;<br>added to the nats 1.0000"
    with pytest.raises(ValueError, match="parts has 1 entries"):
        display.plot_direct_attribution(torch.rand(2), ["a"])
