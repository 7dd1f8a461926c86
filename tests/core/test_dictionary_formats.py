"""Published dictionaries: what is read encodes and decodes as each format's paper or library writes it down."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import nnterp
from nnterp.record import replace
from nnterp.traced import ConstantNorm, Dictionary, Gated, GroupMax, JumpRelu, TopK, UnitVariance

WIDTH, FEATURES, OUT = 6, 10, 6


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + 7 * sum(shape)))


def x_of(width=WIDTH):
    return normal(3, 4, width, seed=99) * 3


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def write(folder, settings, tensors, config="cfg.json", weights="sae_weights.safetensors"):
    (folder / weights).parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / weights)
    (folder / config).write_text(json.dumps(settings))
    return folder


def weights(output=WIDTH):
    return {
        "W_enc": normal(WIDTH, FEATURES, seed=1),
        "b_enc": normal(FEATURES, seed=2),
        "W_dec": normal(FEATURES, output, seed=3),
        "b_dec": normal(output, seed=4),
    }


def cfg(architecture, hook="blocks.5.hook_resid_post", **more):
    about = {"sae_lens_version": "6.0.0", "hook_name": hook, "model_name": "gpt2", "prepend_bos": True}
    base = {"architecture": architecture, "d_in": WIDTH, "d_sae": FEATURES, "apply_b_dec_to_input": False}
    return base | {"normalize_activations": "none", "metadata": about | more.pop("metadata", {})} | more


# -- SAELens ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subtracts", [True, False])
def test_standard(tmp_path, subtracts):
    w, x = weights(), x_of()
    found = nnterp.load_dictionary(write(tmp_path, cfg("standard", apply_b_dec_to_input=subtracts), w))
    features = ((x - (w["b_dec"] if subtracts else 0)) @ w["W_enc"] + w["b_enc"]).clamp(min=0)
    close(found.encode(x), features)
    close(found.decode(found.encode(x)), features @ w["W_dec"] + w["b_dec"])
    assert (found.reads, found.writes) == ("layers_output[5]",) * 2
    assert (found.model_name, found.prepend_bos, found.is_transcoder) == ("gpt2", True, False)


def test_gated(tmp_path):
    w, x = weights(), x_of()
    w |= {name: normal(FEATURES, seed=i) for i, name in enumerate(["b_gate", "b_mag", "r_mag"])}
    found = nnterp.load_dictionary(write(tmp_path, cfg("gated"), w))
    gate = (x @ w["W_enc"] + w["b_gate"]) > 0
    size = torch.relu(x @ (w["W_enc"] * torch.exp(w["r_mag"])) + w["b_mag"])
    close(found.encode(x), gate * size)
    assert 0 < gate.float().mean() < 1


def test_jumprelu(tmp_path):
    w, x = weights() | {"threshold": normal(FEATURES, seed=9).abs()}, x_of()
    found = nnterp.load_dictionary(write(tmp_path, cfg("jumprelu"), w))
    pre = x @ w["W_enc"] + w["b_enc"]
    close(found.encode(x), pre * (pre > w["threshold"]))
    assert ((pre > 0) & (pre <= w["threshold"])).any(), "no feature lies between zero and its threshold"


def plain_topk(pre, k):
    kept = torch.zeros_like(pre)
    for row, out in zip(pre.flatten(0, -2), kept.flatten(0, -2), strict=True):
        for i in sorted(range(len(row)), key=lambda i: -float(row[i]))[:k]:
            out[i] = max(float(row[i]), 0.0)
    return kept


@pytest.mark.parametrize("rescale", [False, True])
def test_topk(tmp_path, rescale):
    w, x = weights(), x_of()
    found = nnterp.load_dictionary(write(tmp_path, cfg("topk", k=3, rescale_acts_by_decoder_norm=rescale), w))
    norms = w["W_dec"].norm(dim=-1) if rescale else torch.ones(FEATURES)
    features = plain_topk((x @ w["W_enc"] + w["b_enc"]) * norms, 3)
    close(found.encode(x), features)
    close(found.decode(features), features / norms @ w["W_dec"] + w["b_dec"])


def test_matryoshka_and_batchtopk_checkpoints_are_jumprelu_at_their_threshold(tmp_path):
    w, x = weights() | {"topk_threshold": torch.tensor(1.5, dtype=torch.double)}, x_of()
    for kind in ("batchtopk", "matryoshka_batchtopk"):
        settings = cfg(kind, k=2.5, rescale_acts_by_decoder_norm=True)
        found = nnterp.load_dictionary(write(tmp_path / kind, settings, w))
        norms = w["W_dec"].norm(dim=-1)
        pre = (x @ w["W_enc"] + w["b_enc"]) * norms
        close(found.encode(x), pre * (pre > 1.5))
        close(found.decode(found.encode(x)), (pre * (pre > 1.5)) / norms @ w["W_dec"] + w["b_dec"])


@pytest.mark.parametrize("kind", ["transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder"])
def test_transcoders(tmp_path, kind):
    w, x, output = weights(output=4), x_of(), 4
    w |= {"threshold": normal(FEATURES).abs()} if "jumprelu" in kind else {}
    w |= {"W_skip": normal(output, WIDTH, seed=6)} if "skip" in kind else {}
    about = {"hook_name_out": "blocks.5.hook_mlp_out"}
    settings = cfg(kind, "blocks.5.mlp.hook_in", d_out=output, metadata=about)
    found = nnterp.load_dictionary(write(tmp_path, settings, w))
    pre = x @ w["W_enc"] + w["b_enc"]
    features = pre * (pre > w["threshold"]) if "jumprelu" in kind else pre.clamp(min=0)
    decoded = features @ w["W_dec"] + w["b_dec"] + (x @ w["W_skip"].T if "skip" in kind else 0)
    close(found.decode(found.encode(x), x), decoded)
    assert (found.reads, found.writes, found.output_width) == ("mlps_input[5]", "mlp_contributions[5]", 4)
    if "skip" in kind:
        with pytest.raises(ValueError, match="give decode\\(\\) x"):
            found.decode(features)


def test_layout_before_version_6(tmp_path):
    w, x = weights() | {"scaling_factor": torch.ones(FEATURES)}, x_of()
    settings = {"d_in": WIDTH, "d_sae": FEATURES, "hook_point": "blocks.2.hook_resid_pre", "activation_fn_str": "topk"}
    settings |= {"activation_fn_kwargs": {"k": 2}, "model_name": "gpt2-small", "normalize_activations": "none"}
    found = nnterp.load_dictionary(write(tmp_path, settings, w))
    close(found.encode(x), plain_topk((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"], 2))
    assert (found.reads, found.prepend_bos) == ("layers_input[2]", True)


def test_finetuned_decoders_are_scaled(tmp_path):
    w, x = weights() | {"scaling_factor": normal(FEATURES).abs()}, x_of()
    settings = {"d_in": WIDTH, "d_sae": FEATURES, "finetuning_scaling_factor": True, "hook_name": "hook_embed"}
    found = nnterp.load_dictionary(write(tmp_path, settings, w))
    features = ((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu()
    close(found.decode(found.encode(x)), (features * w["scaling_factor"]) @ w["W_dec"] + w["b_dec"])


def test_unit_variance(tmp_path):
    w, x = weights(), x_of() + 5
    found = nnterp.load_dictionary(write(tmp_path, cfg("standard", normalize_activations="layer_norm"), w))
    mean = x.mean(-1, keepdim=True)
    std = ((x - mean) ** 2).sum(-1, keepdim=True).div(WIDTH - 1).sqrt()
    features = ((x - mean) / (std + 1e-5) @ w["W_enc"] + w["b_enc"]).relu()
    close(found.encode(x), features)
    close(found.decode(features, x), (features @ w["W_dec"] + w["b_dec"]) * std + mean)


def test_constant_norm(tmp_path):
    w, x = weights(), x_of()
    found = nnterp.load_dictionary(write(tmp_path, cfg("standard", normalize_activations="constant_norm_rescale"), w))
    factor = math.sqrt(WIDTH) / x.norm(dim=-1, keepdim=True)
    features = (x * factor @ w["W_enc"] + w["b_enc"]).relu()
    close(found.encode(x), features)
    close(found.decode(features, x), (features @ w["W_dec"] + w["b_dec"]) / factor)


@pytest.mark.parametrize("subtracts", [False, True])
def test_trained_on_centred_weights(tmp_path, subtracts):
    """TransformerLens' center_writing_weights: it was trained on the stream less its mean over channels."""
    w, x = weights(), x_of() + 3
    kwargs = {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
    settings = cfg("standard", apply_b_dec_to_input=subtracts)
    settings["metadata"] = {**settings["metadata"], **kwargs}
    write(tmp_path, settings, w)
    found = nnterp.load_dictionary(tmp_path)
    centred = x - x.mean(-1, keepdim=True)
    features = ((centred - w["b_dec"] * subtracts) @ w["W_enc"] + w["b_enc"]).relu()
    assert not torch.allclose(features, ((x - w["b_dec"] * subtracts) @ w["W_enc"] + w["b_enc"]).relu(), atol=1e-2)
    close(found.encode(x), features)
    close(found.decode(features), features @ w["W_dec"] + w["b_dec"])
    settings["metadata"]["hook_name"] = "blocks.5.attn.hook_z"  # what heads return is not centred
    write(tmp_path, settings, w)
    close(nnterp.load_dictionary(tmp_path).encode(x), ((x - w["b_dec"] * subtracts) @ w["W_enc"] + w["b_enc"]).relu())


def test_average_norm_is_asked_for_and_folded_in(tmp_path):
    w, x = weights() | {"threshold": torch.full((FEATURES,), 0.3)}, x_of()
    settings = cfg("jumprelu", normalize_activations="expected_average_only_in", apply_b_dec_to_input=True)
    write(tmp_path, settings, w)
    with pytest.raises(ValueError, match="average_norm="):
        nnterp.load_dictionary(tmp_path)
    found = nnterp.load_dictionary(tmp_path, average_norm=20.0)
    scale = math.sqrt(WIDTH) / 20
    pre = (x * scale - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    features = pre * (pre > 0.3)
    close(found.encode(x), features)
    close(found.decode(features), (features @ w["W_dec"] + w["b_dec"]) / scale)


# -- the others ------------------------------------------------------------------------------------------------------


def test_gemma_scope(tmp_path):
    w, x = weights() | {"threshold": normal(FEATURES, seed=9).abs()}, x_of()
    for release, site in (("res", "layers_output[12]"), ("mlp", "mlp_contributions[12]")):
        folder = tmp_path / f"gemma-scope-2b-pt-{release}" / "layer_12" / "width_16k" / "average_l0_82"
        folder.mkdir(parents=True)
        np.savez(folder / "params.npz", **{name: tensor.numpy() for name, tensor in w.items()})
        found = nnterp.load_dictionary(folder)
        pre = x @ w["W_enc"] + w["b_enc"]
        close(found.encode(x), (pre > w["threshold"]) * pre.relu())
        close(found.decode(found.encode(x)), (pre > w["threshold"]) * pre.relu() @ w["W_dec"] + w["b_dec"])
        assert (found.reads, found.model_name, found.prepend_bos) == (site, "google/gemma-2-2b", True)
        assert nnterp.load_dictionary(folder / "params.npz").reads == site


def test_gemma_scope_2(tmp_path):
    w, x = weights() | {"threshold": normal(FEATURES, seed=9).abs()}, x_of()
    lower = {name.replace("W_", "w_"): tensor for name, tensor in w.items()}
    skip = normal(WIDTH, WIDTH, seed=5)
    native = {"hf_hook_point_in": "model.layers.7.pre_feedforward_layernorm.output"}
    native |= {"hf_hook_point_out": "model.layers.7.post_feedforward_layernorm.output"}
    settings = {"architecture": "jump_relu", "model_name": "google/gemma-3-1b-pt", "affine_connection": True} | native
    both = lower | {"affine_skip_connection": skip}
    found = nnterp.load_dictionary(write(tmp_path, settings, both, "config.json", "params.safetensors"))
    pre = x @ w["W_enc"] + w["b_enc"]
    close(found.decode(found.encode(x), x), pre * (pre > w["threshold"]) @ w["W_dec"] + w["b_dec"] + x @ skip)
    assert (found.reads, found.writes) == ("mlps_input[7]", "mlp_contributions[7]")
    crossed = lower | {"w_dec": normal(FEATURES, 3, WIDTH)}
    write(tmp_path, settings, crossed, "config.json", "params.safetensors")
    with pytest.raises(ValueError, match="crosscoder or a cross-layer transcoder"):
        nnterp.load_dictionary(tmp_path)


def llama_scope(**more):
    norms = {"in": 11.0, "out": 11.0}
    base = {"act_fn": "jumprelu", "d_model": WIDTH, "jump_relu_threshold": 0.05, "norm_activation": "dataset-wise"}
    base |= {"dataset_average_activation_norm": norms, "sparsity_include_decoder_norm": True}
    return base | {"hook_point_in": "blocks.3.hook_resid_post", "hook_point_out": "blocks.3.hook_resid_post"} | more


def test_llama_scope(tmp_path):
    """The publisher's own loader, written out: fold the average norm, then the decoder's norms, then the threshold."""
    w, x = weights(), x_of()
    linear = {"encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"]}
    linear |= {"decoder.weight": w["W_dec"].T, "decoder.bias": w["b_dec"]}
    write(tmp_path, llama_scope(), linear, "hyperparams.json", "checkpoints/final.safetensors")
    found = nnterp.load_dictionary(tmp_path)
    factor = math.sqrt(WIDTH) / 11
    norms = w["W_dec"].norm(dim=-1)
    pre = (x @ w["W_enc"] + w["b_enc"] / factor) * norms
    features = torch.where(pre > 0.05, pre, 0.0)
    close(found.encode(x), features)
    close(found.decode(features), features @ (w["W_dec"] / norms[:, None]) + w["b_dec"] / factor)
    assert found.reads == "layers_output[3]"
    unfolded = (x * factor) @ w["W_enc"] + w["b_enc"]
    close(found.decode(found.encode(x)), (unfolded * (pre > 0.05) @ w["W_dec"] + w["b_dec"]) / factor)


@pytest.mark.parametrize("act_fn", ["jumprelu", "topk", "relu"])
def test_openmoss_with_learnt_thresholds(tmp_path, act_fn):
    w, x = weights(), x_of()
    new = {"W_E": w["W_enc"], "b_E": w["b_enc"], "W_D": w["W_dec"], "b_D": w["b_dec"]}
    new |= {"activation_function.log_jumprelu_threshold": normal(FEATURES)} if act_fn == "jumprelu" else {}
    hooks = {"hook_point_in": "blocks.3.hook_resid_mid", "hook_point_out": "blocks.3.hook_mlp_out"}
    norms = {hooks["hook_point_in"]: 11.0, hooks["hook_point_out"]: 5.0}
    settings = llama_scope(act_fn=act_fn, sae_type="sae", top_k=3, dataset_average_activation_norm=norms, **hooks)
    found = nnterp.load_dictionary(write(tmp_path, settings, new, "config.json"))
    given, returned = math.sqrt(WIDTH) / 11, math.sqrt(WIDTH) / 5
    pre = x * given @ w["W_enc"] + w["b_enc"]
    sizes = pre * w["W_dec"].norm(dim=-1)
    if act_fn == "jumprelu":
        kept = pre * (sizes > new["activation_function.log_jumprelu_threshold"].exp())
    else:
        kept = pre * (plain_topk(sizes, 3) > 0) if act_fn == "topk" else pre.relu()
    close(found.decode(found.encode(x)), (kept @ w["W_dec"] + w["b_dec"]) / returned)
    assert (found.reads, found.writes) == ("layers_mid[3]", "mlp_contributions[3]")


SPARSIFY = {"d_in": WIDTH, "num_latents": FEATURES, "k": 2, "expansion_factor": 32, "normalize_decoder": True}


@pytest.mark.parametrize("module", ["layers.5", "transformer.h.5.mlp", "gpt_neox.layers.5.attention"])
@pytest.mark.parametrize("transcode", [False, True])
@pytest.mark.parametrize("activation", ["topk", "groupmax"])
def test_sparsify(tmp_path, module, transcode, activation):
    w, x = weights(), x_of()
    stored = {"encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"], "W_dec": w["W_dec"], "b_dec": w["b_dec"]}
    stored |= {"W_skip": normal(WIDTH, WIDTH)} if transcode else {}
    settings = SPARSIFY | {"activation": activation, "transcode": transcode, "skip_connection": transcode}
    found = nnterp.load_dictionary(write(tmp_path / module, settings, stored, weights="sae.safetensors"))
    pre = ((x if transcode else x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu()
    if activation == "topk":
        features = plain_topk(pre, 2)
    else:
        halves = pre.unflatten(-1, (2, FEATURES // 2))
        features = (halves * (halves == halves.max(-1, keepdim=True).values)).flatten(-2)
    close(found.encode(x), features)
    decoded = features @ w["W_dec"] + w["b_dec"] + (x @ stored["W_skip"].T if transcode else 0)
    close(found.decode(features, x), decoded)
    part = {"5": "layers", "mlp": "mlps", "attention": "attentions"}[module.split(".")[-1]]
    assert found.writes == f"{part}_output[5]"
    assert found.reads == (f"{part}_input[5]" if transcode else f"{part}_output[5]")


def test_circuit_tracer_layers(tmp_path):
    w, x = weights(), x_of()
    (tmp_path / "config.yaml").write_text(
        "model_name: Qwen/Qwen3-0.6B\nmodel_kind: transcoder_set\n"
        "feature_input_hook: mlp.hook_in\nfeature_output_hook: hook_mlp_out\n"
    )
    rows = {"W_enc": w["W_enc"].T.contiguous(), "W_dec": w["W_dec"], "b_enc": w["b_enc"], "b_dec": w["b_dec"]}
    save_file(rows | {"W_skip": normal(WIDTH, WIDTH)}, tmp_path / "layer_0.safetensors")
    save_file(rows | {"activation_function.threshold": normal(FEATURES).abs()}, tmp_path / "layer_1.safetensors")
    turned = {"W_dec": w["W_dec"].T.contiguous(), "k": torch.tensor(9)}
    save_file(rows | turned, tmp_path / "layer_2.safetensors")
    found = nnterp.load_transcoders(tmp_path)
    assert list(found) == [0, 1, 2]
    pre = x @ w["W_enc"] + w["b_enc"]
    close(found[0].decode(found[0].encode(x), x), pre.relu() @ w["W_dec"] + w["b_dec"] + x @ normal(WIDTH, WIDTH).T)
    close(found[1].encode(x), pre * (pre > normal(FEATURES).abs()))
    kept = pre.topk(9, dim=-1)
    signed = torch.zeros_like(pre).scatter(-1, kept.indices, kept.values)
    assert (signed < 0).any()
    close(found[2].decode(found[2].encode(x)), signed @ w["W_dec"] + w["b_dec"])
    assert (found[2].reads, found[2].writes) == ("mlps_input[2]", "mlp_contributions[2]")
    one = nnterp.load_dictionary(tmp_path, "layer_1.safetensors")
    close(one.encode(x), found[1].encode(x))


def test_a_transcoder_of_unknown_places_is_never_taken_for_an_autoencoder(tmp_path, toy):
    """Without the config.yaml beside it: what it reads does not say what it writes."""
    width = toy.hidden_size
    rows = {"W_enc": normal(FEATURES, width), "W_dec": normal(FEATURES, width)}
    save_file(rows | {"b_enc": normal(FEATURES), "b_dec": normal(width)}, tmp_path / "layer_1.safetensors")
    found = nnterp.load_dictionary(tmp_path, "layer_1.safetensors", reads="mlps_input[1]")
    assert (found.reads, found.writes, found.is_transcoder) == ("mlps_input[1]", None, True)
    unknown = nnterp.load_dictionary(tmp_path, "layer_1.safetensors")
    assert unknown.is_transcoder
    for one in (found, unknown):
        with pytest.raises(ValueError, match="writes='mlps_output"):
            nnterp.attach(toy, one, at="mlps_input[1]")
    assert not toy.attachments
    again = nnterp.load_dictionary(nnterp.save_dictionary(unknown, tmp_path / "saved"))
    assert again.is_transcoder


def test_circuit_tracer_across_layers(tmp_path):
    xs = [normal(3, 4, WIDTH, seed=i) for i in range(3)]
    encoders = [normal(FEATURES, WIDTH, seed=10 + i) for i in range(3)]
    decoders = [normal(FEATURES, 3 - i, WIDTH, seed=20 + i) for i in range(3)]
    biases = [normal(WIDTH, seed=30 + i) for i in range(3)]
    for i in range(3):
        first = {f"W_enc_{i}": encoders[i], f"b_enc_{i}": torch.zeros(FEATURES), f"b_dec_{i}": biases[i]}
        save_file(first | {f"threshold_{i}": torch.full((FEATURES,), 0.5)}, tmp_path / f"W_enc_{i}.safetensors")
        save_file({f"W_dec_{i}": decoders[i]}, tmp_path / f"W_dec_{i}.safetensors")
    found = nnterp.load_transcoders(tmp_path, dtype=None)
    pres = [x @ encoder.T for x, encoder in zip(xs, encoders, strict=True)]
    features = [pre * (pre > 0.5) for pre in pres]
    for layer in range(3):
        close(found.encode(xs[layer], layer), features[layer])
        total = sum(features[i] @ decoders[i][:, layer - i] for i in range(layer + 1)) + biases[layer]
        close(found.decode(features, layer), total)
    assert found.num_layers == 3
    with pytest.raises(ValueError, match="load_transcoders"):
        nnterp.load_dictionary(tmp_path)
    (tmp_path / "W_dec_1.safetensors").unlink()
    with pytest.raises(ValueError, match="the decoder of layer 1"):
        nnterp.load_transcoders(tmp_path)


# -- writing -----------------------------------------------------------------------------------------------------------


def made(activation, **more):
    base = Dictionary(normal(FEATURES, WIDTH), normal(FEATURES), normal(FEATURES, OUT), normal(OUT, seed=1), activation)
    return replace(base, reads="layers_output[5]", writes="layers_output[5]", **more)


ACTIVATIONS = {
    "jumprelu": JumpRelu(normal(FEATURES).abs()),
    "topk": TopK(3),
    "signed": TopK(3, signed=True),
    "gated": Gated(normal(FEATURES, seed=5), normal(FEATURES, seed=6), normal(FEATURES, seed=7)),
    "groupmax": GroupMax(5),
}


@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("transcodes", [False, True])
def test_what_is_saved_reads_back_equal(tmp_path, kind, transcodes):
    more = {"input_bias": normal(OUT, seed=1), "model_name": "some/model", "prepend_bos": False}
    if transcodes:
        more = {"skip": normal(OUT, WIDTH), "input_bias": normal(WIDTH, seed=8), "scaling": UnitVariance(False)}
    given = made(ACTIVATIONS[kind], **more)
    if kind == "gated":
        given = replace(given, encoder_bias=torch.zeros(FEATURES))
    given = replace(given, writes="mlps_output[5]") if transcodes else replace(given, scaling=ConstantNorm())
    found = nnterp.load_dictionary(nnterp.save_dictionary(given, tmp_path / "new" / "folder"))
    x = x_of()
    assert torch.equal(found.encode(x), given.encode(x))
    assert torch.equal(found.decode(found.encode(x), x), given.decode(given.encode(x), x))
    for name in ("reads", "writes", "model_name", "prepend_bos", "scaling"):
        assert getattr(found, name) == getattr(given, name), name


def test_a_record_of_the_model_is_written(tmp_path, toy):
    nnterp.save_dictionary(made(TopK(3)), tmp_path, toy)
    record = json.loads((tmp_path / "cfg.json").read_text())["metadata"]["nnterp"]
    assert (record["class"], record["layers"], record["hidden_size"]) == ("LlamaForCausalLM", 8, 128)
    assert record["certificate"] == toy.certificate.ok
    assert record["proof"] == "weights"
