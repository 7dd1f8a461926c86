"""Features of attached dictionaries in the interventions, against plain torch hooks and formulas of their own."""

import re
import runpy
from functools import cache
from pathlib import Path

import pytest
import torch

import nnterp
from nnterp import Dictionary, StandardizedTransformer, attach, detach
from nnterp.errors import Unavailable
from nnterp.interventions import (
    Component,
    ablate,
    activation_patching,
    attribution_patching,
    components,
    direct_logit_attribution,
    feature_vector,
)
from nnterp.record import replace
from nnterp.testing import tiny_model, tiny_tokenizer
from nnterp.traced import Activation, ConstantNorm, UnitVariance

from .reference import hooks, logits_with

KINDS = [
    "gpt2",
    "llama",
    "gemma2",
    "mixtral",
    "gpt_neox",
    "opt",
    "falcon",
    "cohere",
    "mamba",
    "olmo2",
    "bloom",
    "jamba",
]
CLEAN, CORRUPTED = [11, 42, 57, 93, 130], [11, 42, 99, 93, 131]
LAYER, FEATURES = 1, 40
SITES = {"autoencoder": ("layers_output", "layers_output"), "transcoder": ("mlps_input", "mlps_output")}


@cache
def wrapped(kind):
    return StandardizedTransformer(tiny_model(kind), tokenizer=tiny_tokenizer())


def random_dictionary(width, seed=0, features=FEATURES):
    g = torch.Generator().manual_seed(seed)
    encoder, decoder = (torch.randn(features, width, generator=g) for _ in range(2))
    bias, offset = 0.1 * torch.randn(features, generator=g), torch.randn(width, generator=g)
    return Dictionary(encoder / width**0.5, bias, decoder / width**0.25, offset, Activation())


@pytest.fixture(params=[(kind, sort) for kind in KINDS for sort in SITES], ids="-".join)
def spliced(request):
    """A model, its dictionary, and the values that the dictionary reads and writes."""
    kind, sort = request.param
    if sort == "transcoder" and kind in ("mamba", "jamba"):
        pytest.skip("the layer has no feed-forward of one module")
    model, (reads, writes) = wrapped(kind), SITES[sort]
    dictionary = random_dictionary(model.hidden_size)
    attach(model, dictionary, f"{reads}[{LAYER}]", f"{writes}[{LAYER}]")
    yield model, dictionary, reads, writes
    detach(model)


def metric(logits):
    return logits[:, 5] - logits[:, 9]


def encoded(x, d):
    return torch.clamp(torch.einsum("...w,fw->...f", x.float(), d.encoder) + d.encoder_bias, min=0)


def features_of(model, d, reads, prompt):
    """Features `[seq, features]`, by a plain hook."""
    seen = []
    logits_with(model, prompt, [(reads, LAYER, lambda x: seen.append(x.detach().clone()))])
    return encoded(seen[0].reshape(-1, d.encoder.shape[1]), d)


def run_edited(model, d, reads, writes, prompt, change):
    """Logits `[seq, vocab]` with `change(features [seq, features])` decoded and added where the dictionary writes."""
    seen = []

    def add(y):
        return y + (change(seen[0]) @ d.decoder).reshape(y.shape).to(y)

    def see(x):
        seen.append(encoded(x.detach().reshape(-1, d.encoder.shape[1]), d))
        return add(x) if reads == writes else None

    edits = [(reads, LAYER, see)] + ([] if reads == writes else [(writes, LAYER, add)])
    return logits_with(model, prompt, edits)


def only(index, value, position=None):
    """A change `[seq, features]` of one feature, at one position or all."""

    def change(features):
        made = torch.zeros_like(features)
        at = slice(None) if position is None else position
        made[at, index] = (value[at, index] if isinstance(value, torch.Tensor) else value) - features[at, index]
        return made

    return change


def close(found, expected, logits):
    assert (found - expected).abs().max() <= 1e-4 * max(1, float(logits.abs().max())), (found, expected)


def test_reading_splicing_and_writing(spliced):
    model, d, reads, writes = spliced
    expected = features_of(model, d, reads, CLEAN)
    with torch.no_grad(), model.trace(CLEAN):
        plain = model.logits.save()
    with torch.no_grad(), model.trace(CLEAN):
        features = model.features[LAYER]
        kept = features.clone().save()
        model.features[LAYER] = features
        same = model.logits.save()
    torch.testing.assert_close(kept[0], expected, rtol=1e-4, atol=1e-4 * float(expected.max()))
    assert torch.equal(same, plain)
    assert (expected > 0).float().mean() > 0.2
    with torch.no_grad(), model.trace(CLEAN):
        features = model.features[LAYER]
        features[:, :, 3] = 5.0
        model.features[LAYER] = features
        again = model.features[LAYER].save()
        again[:, 2, 7] = 4.0
        model.features[f"{reads}[{LAYER}]"] = again
        edited = model.logits.save()
    assert torch.equal(again[0, :, 3], torch.full_like(again[0, :, 3], 5.0))
    both = run_edited(model, d, reads, writes, CLEAN, lambda f: only(3, 5.0)(f) + only(7, 4.0, 2)(f))
    close(edited[0], both, plain)
    assert (both - plain[0]).abs().max() > 1e-2 * plain.abs().max()


def test_patching_ablation_and_attribution(spliced):
    model, d, reads, writes = spliced
    clean, corrupted = (features_of(model, d, reads, prompt) for prompt in (CLEAN, CORRUPTED))
    picked = (clean[-1] - corrupted[-1]).abs().topk(3).indices.tolist()
    site = (model, d, reads, writes)
    logits = logits_with(model, CORRUPTED)

    patched = activation_patching(
        model, CLEAN, CORRUPTED, metric, values="features", heads=picked, positions=-1, layers=[LAYER]
    )["scores"].flatten()
    for score, index in zip(patched, picked, strict=True):
        expected = metric(run_edited(*site, CORRUPTED, only(index, clean, -1))[-1:])
        close(score, expected, logits)
    assert (patched - metric(logits[-1:])).abs().max() > 1e-3

    ablated = ablate(model, CORRUPTED, components(model, "features", LAYER, picked), metric=metric)["scores"].flatten()
    for score, index in zip(ablated, picked, strict=True):
        close(score, metric(run_edited(*site, CORRUPTED, only(index, 0.0))[-1:]), logits)

    slope = torch.zeros(len(CORRUPTED), FEATURES, requires_grad=True)
    with hooks(model, [(writes, LAYER, lambda y: y + (slope @ d.decoder).reshape(y.shape).to(y))]):
        score = metric(model._module(input_ids=torch.tensor([CORRUPTED]), use_cache=False).logits[:, -1].float())
    (slope,) = torch.autograd.grad(score.sum(), slope)
    found = model.gradients([CORRUPTED], lambda logits: metric(logits[:, -1].float()).sum(), "features")
    torch.testing.assert_close(found["features", LAYER][0], slope, rtol=1e-3, atol=1e-4 * float(slope.abs().max()))
    estimated = attribution_patching(
        model, CLEAN, CORRUPTED, metric, values="features", heads=picked, positions=-1, layers=[LAYER], audit=0
    )["scores"].flatten()
    torch.testing.assert_close(
        estimated, ((clean - corrupted) * slope)[-1, picked], rtol=1e-3, atol=1e-4 * float(slope.abs().max())
    )


def test_several_layers_of_different_sizes_in_one_call():
    model = wrapped("llama")
    small, large = random_dictionary(model.hidden_size, 1), random_dictionary(model.hidden_size, 2, 56)
    try:
        attach(model, small, "layers_output[0]")
        attach(model, large, "layers_output[2]")
        found = activation_patching(model, CLEAN, CORRUPTED, metric, values="features", heads=[39], positions=-1)
        assert found.labels["layers"] == (0, 2)
        with pytest.raises(IndexError, match="one of the layers has 40 features"):
            activation_patching(model, CLEAN, CORRUPTED, metric, values="features", heads=[40], positions=-1)
        alone = activation_patching(
            model, CLEAN, CORRUPTED, metric, values="features", layers=[2], heads=[55], positions=-1
        )
        assert alone["scores"].isfinite().all()
        detach(model, 2)
        attach(model, small, "layers_output[2]")
        with pytest.raises(IndexError, match="40 features"):
            ablate(model, CLEAN, Component("features", 2, 55), metric=metric)
    finally:
        detach(model)


def test_several_dictionaries_of_one_layer():
    """Each by its own index: against a model that has the same dictionary alone, and against plain hooks."""
    model = wrapped("llama")
    first, second = random_dictionary(model.hidden_size, 1), random_dictionary(model.hidden_size, 2, 56)
    sites = {(1, 0): (first, "layers_output", "layers_output"), (1, 1): (second, "mlps_input", "mlps_output")}
    patching = {"metric": metric, "values": "features", "heads": [3, 17, 39], "positions": -1}
    alone = {}
    try:
        for index, (d, reads, writes) in sites.items():
            attach(model, d, f"{reads}[1]", f"{writes}[1]")
            assert components(model, "features", (1, 0), 3) == [Component("features", 1, 3)]
            alone[index] = activation_patching(model, CLEAN, CORRUPTED, **patching)["scores"]
            detach(model)
        for d, reads, writes in sites.values():
            attach(model, d, f"{reads}[1]", f"{writes}[1]")
        found = activation_patching(model, CLEAN, CORRUPTED, **patching)
        assert found.labels["layers"] == ("1, 0", "1, 1")
        torch.testing.assert_close(found["scores"], torch.cat(list(alone.values()), 1), rtol=1e-4, atol=1e-5)
        assert float((found["scores"][:, 0] - found["scores"][:, 1]).abs().max()) > 1e-3
        one = activation_patching(model, CLEAN, CORRUPTED, layers=(1, 1), **patching)["scores"]
        torch.testing.assert_close(one, alone[1, 1], rtol=1e-4, atol=1e-5)
        both = [Component("features", (1, 0), 3), Component("features", (1 - model.num_layers, 1), 55)]
        assert str(both[0]) == "features[1, 0] head 3"
        assert both[:1] == components(model, "features", [(1, 0)], 3)
        ablated = ablate(model, CLEAN, both, metric=metric)["scores"][0]
        for (d, reads, writes), unit, score in zip(sites.values(), (3, 55), ablated, strict=True):
            edited = run_edited(model, d, reads, writes, CLEAN, only(unit, 0.0))[-1]
            close(score, metric(edited[None])[0], edited)
        estimated = attribution_patching(
            model, CLEAN, CORRUPTED, metric, values="features", layers=[(1, 1)], heads=[55]
        )
        clean, corrupted = (features_of(model, second, "mlps_input", prompt)[:, 55] for prompt in (CLEAN, CORRUPTED))
        slope = model.gradients(CORRUPTED, lambda x: metric(x[:, -1]).sum(), "features[1, 1]")["features", (1, 1)][
            0, :, 55
        ]
        close(estimated["scores"].flatten()[0], ((clean - corrupted) * slope).sum(), torch.ones(()))
        with pytest.raises(ValueError, match="two numbers"):
            components(model, "features", 1)
        with pytest.raises(IndexError, match=r"numbers \[0, 1\]"):
            components(model, "features", [(1, 2)])
        detach(model, (1, 1))
        attach(model, first, "layers_output[0]")
        assert len(components(model, "features", [1, 0])) == 2
        with pytest.raises(ValueError, match=r"\[1, 0\] or \[\(1, 0\)\]"):
            components(model, "features", (1, 0))
    finally:
        detach(model)


def test_steering_by_a_feature():
    model = wrapped("llama")
    d = random_dictionary(model.hidden_size)
    try:
        attach(model, d, "layers_output[1]")
        attach(model, d, "mlps_input[2]", "mlps_output[2]")
        for layer in (1, 2):
            vector = feature_vector(model, layer, -1)
            assert vector.layers == (layer,)
            assert torch.equal(vector[layer], d.decoder[-1])
            with torch.no_grad(), model.steering(vector, factor=2.5), model.trace(CLEAN):
                steered = model.logits.save()
            name = "layers_output" if layer == 1 else "mlps_output"
            expected = logits_with(model, CLEAN, [(name, layer, lambda y: y + 2.5 * d.decoder[-1])])
            close(steered[0], expected, expected)
        with pytest.raises(IndexError, match="40 features"):
            feature_vector(model, 1, 40)
        attach(model, d, "mlps_input[1]")
        with pytest.raises(ValueError, match="no steering vectors"):
            feature_vector(model, (1, 1), 0)
    finally:
        detach(model)
    with pytest.raises(Unavailable, match=r"attach"):
        feature_vector(model, 1, 0)


@pytest.mark.parametrize("sort", SITES)
def test_direct_attribution_by_feature(sort):
    model, (reads, writes) = wrapped("llama"), SITES[sort]
    d = random_dictionary(model.hidden_size)
    kinds = model.support()
    try:
        attach(model, d, f"{reads}[{LAYER}]", f"{writes}[{LAYER}]")
        found = direct_logit_attribution(model, [CLEAN, CORRUPTED], (5, 9), by="feature")
        assert kinds["features"] == ()
        for row, prompt in enumerate((CLEAN, CORRUPTED)):
            features = features_of(model, d, reads, prompt)[-1]
            stream = []
            last = model.num_layers - 1
            logits_with(model, prompt, [("layers_output", last, lambda x, kept=stream: kept.append(x[0, -1].detach()))])
            norm = model._module.get_submodule(model.anatomy.ln_final)
            scale = norm.weight / (stream[0].pow(2).mean() + norm.variance_epsilon).sqrt()
            head = model._module.get_output_embeddings().weight
            expected = features * (d.decoder @ (scale * (head[5] - head[9])))
            labels = found.labels["parts"]
            at = [labels.index(f"L{LAYER}.F{i}") for i in range(FEATURES)]
            torch.testing.assert_close(found["scores"][row, at], expected.detach(), rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(found["scores"][row].sum(), found["logits"][row], rtol=1e-4, atol=1e-4)
        assert (f"L{LAYER} error" if sort == "autoencoder" else f"L{LAYER} mlp error") in labels
        assert found.grid().shape == (2, LAYER + 1, FEATURES)
        attach(model, random_dictionary(model.hidden_size, 5), f"layers_output[{LAYER + 1}]")
        with pytest.raises(Unavailable, match="Detach one"):
            direct_logit_attribution(model, CLEAN, 5, by="feature")
    finally:
        detach(model)
    with pytest.raises(Unavailable, match="attach a dictionary first"):
        direct_logit_attribution(model, CLEAN, 5, by="feature")


@pytest.mark.parametrize("scaling", [UnitVariance(), ConstantNorm()], ids=lambda s: type(s).__name__)
def test_a_feature_that_is_scaled_by_each_activation_is_no_vector(toy, scaling):
    """Raising it adds another length at every position, which a vector of one length would get wrong."""
    attach(toy, replace(nnterp.toy_dictionary("residual_4"), scaling=scaling))
    try:
        with torch.no_grad(), toy.trace("The capital of France is"):
            before = toy.layers_output[4].clone().save()
            raised = toy.features[4].clone()
            raised[..., 333] += 10
            toy.features[4] = raised
            after = toy.layers_output[4].save()
        lengths = (after - before)[0].norm(dim=-1)
        assert lengths.max() > 1.5 * lengths.min()
        with pytest.raises(Unavailable, match=rf"{type(scaling).__name__}.*model.features\[4\] = "):
            feature_vector(toy, 4, 333)
    finally:
        detach(toy)


def test_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "features.md").read_text(encoding="utf-8")
    file = tmp_path / "page.py"
    file.write_text("\n".join(re.findall(r"^```python\n(.*?)^```$", page, flags=re.M | re.S)), encoding="utf-8")
    names = runpy.run_path(str(file), run_name="page")
    tokenizer = names["model"].tokenizer
    assert names["largest"][0] == 333
    assert tokenizer.decode(names["logits"][0, -1].argmax()) == " Tokyo"
    assert tokenizer.decode(names["untouched"][0, -1].argmax()) == " Paris"
    assert names["of_stream"].shape[-1] == 768
    assert names["of_mlp"].shape[-1] == 384
    assert tokenizer.decode(names["steered"][0, -1].argmax()) == " wonderful"
    assert tokenizer.decode(names["text"][0]).startswith("I am sad. The weather today is wonderful")
    assert names["found"].of(4, 333)[0, 4] > 10
