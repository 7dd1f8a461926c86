"""Files of dictionaries that are damaged, hostile, unknown, or elsewhere: refused, with what was found and is known."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

import nnterp
from nnterp.dictionaries._sites import site_of_hook, site_of_native, sites_of_module

from .test_dictionary_formats import FEATURES, SPARSIFY, WIDTH, cfg, weights, write

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hostile:
    def __reduce__(self):
        return print, ("code ran",)


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "given", cfg("standard"), weights())


def change(folder, **settings):
    path = folder / "cfg.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


def refused(words, source, *path, **options):
    with pytest.raises((ValueError, FileNotFoundError, TypeError), match=words):
        nnterp.load_dictionary(source, *path, **options)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"architecture": "temporal"}, r"architecture is 'temporal', which is not read. Known: 'standard', 'gated'"),
        ({"architecture": ["gated"]}, "architecture is"),
        ({"architecture": "jumprelu"}, "has no threshold. It holds"),
        ({"architecture": "topk"}, "k is None"),
        ({"architecture": "topk", "k": FEATURES + 1}, f"k is {FEATURES + 1}, of {FEATURES} features"),
        ({"architecture": "topk", "k": True}, "k is True"),
        ({"d_in": WIDTH + 1}, r"W_enc has shape \[6, 10\], and \[7, 10\] was expected"),
        ({"d_sae": "10"}, "d_sae is '10'"),
        ({"activation_fn": "tanh-relu"}, "activation_fn is 'tanh-relu', which is not read"),
        ({"activation_fn": "topk", "activation_fn_kwargs": {"k": 2, "signed": True}}, "only k is read"),
        ({"normalize_activations": "covariance_whitening"}, "'covariance_whitening', which is not read"),
        ({"metadata": {"hook_name": "blocks.5.attn.hook_z", "hook_head_index": 3}}, "reads head 3 alone"),
        ({"metadata": [1]}, "metadata is"),
    ],
)
def test_settings_that_are_not_read(folder, settings, words):
    refused(words, change(folder, **settings))


def test_tensors_that_are_not_known_or_not_finite(folder):
    w = weights()
    save_file(w | {"W_rotation": torch.zeros(2)}, folder / "sae_weights.safetensors")
    refused("also holds W_rotation", folder)
    w["W_dec"][0, 0] = float("nan")
    save_file(w, folder / "sae_weights.safetensors")
    refused("W_dec is not finite", folder)


def test_truncated_and_damaged_files(folder):
    path = folder / "sae_weights.safetensors"
    whole = path.read_bytes()
    for part in (whole[:-7], whole[:100], b"", b"\xff" * 64):
        path.write_bytes(part)
        refused("truncated, damaged, or holds more than tensors", folder)
    path.write_bytes(whole)
    settings = (folder / "cfg.json").read_text()
    for broken in (settings[:-9], "[" * 100_000, "\xff", "[1, 2]"):
        (folder / "cfg.json").write_text(broken)
        refused("is damaged|settings by name were expected", folder)


def test_nothing_that_holds_code_is_opened(tmp_path, capsys):
    for name in ("ae.pt", "sae_weights.safetensors", "params.npz"):
        at = tmp_path / name.split(".")[0]
        at.mkdir()
        (at / "cfg.json").write_text(json.dumps(cfg("standard")))
        (at / name).write_bytes(pickle.dumps(Hostile()))
        refused("no dictionary of a known format|holds more than tensors", at)
        refused("only safetensors and npz files|holds more than tensors", at / name)
    objects = tmp_path / "gemma"
    objects.mkdir()
    array = np.empty(1, dtype=object)
    array[0] = Hostile()
    np.savez(objects / "params.npz", W_enc=array)
    refused("holds more than tensors", objects)
    (tmp_path / "layer_0.safetensors").write_bytes(b"")
    (tmp_path / "config.yaml").write_text("!!python/object/apply:builtins.print ['code ran']")
    refused("config.yaml is damaged", tmp_path / "layer_0.safetensors")
    assert "code ran" not in capsys.readouterr().out


def test_unknown_folders_say_what_they_hold(tmp_path):
    refused("It is empty. Known: cfg.json with sae_weights.safetensors", tmp_path)
    (tmp_path / "layer_3").mkdir()
    refused("It holds layer_3.*give one of them as path", tmp_path)
    refused("There is no", tmp_path, "layer_9")
    refused("no owner/name on the hub", str(tmp_path / "nowhere"))
    refused("source is a text or a path", 3)
    refused("reads is a value with its layer", write(tmp_path, cfg("standard"), weights()), reads="layer 3")
    refused("torch.dtype", tmp_path, dtype="float16")
    with pytest.raises(TypeError, match="writes a Dictionary"):
        nnterp.save_dictionary({}, tmp_path)


def test_sparsify_and_openmoss_settings_that_are_not_read(tmp_path):
    w = weights()
    stored = {"encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"], "W_dec": w["W_dec"], "b_dec": w["b_dec"]}
    for change, words in (
        ({"signed": True}, "signed is True, which is not read"),
        ({"activation": "maxout"}, "activation is 'maxout'"),
        ({"activation": "groupmax", "k": 3}, "k is 3, of 10 features"),
        ({"skip_connection": True}, "has no W_skip"),
    ):
        at = tmp_path / "layers.5"
        refused(words, write(at, SPARSIFY | change, stored, weights="sae.safetensors"))
    names = {"W_E": w["W_enc"], "b_E": w["b_enc"], "W_D": w["W_dec"], "b_D": w["b_dec"]}
    base = {"d_model": WIDTH, "act_fn": "relu", "hook_point_in": "a", "hook_point_out": "a"}
    for change, words in (
        ({"norm_activation": "dataset-wise"}, "average norm of the activations"),
        ({"norm_activation": "batch-wise"}, "norm_activation is 'batch-wise'"),
        ({"sae_type": "lorsa"}, "sae_type is 'lorsa'"),
        ({"use_glu_encoder": True}, "use_glu_encoder is True"),
        ({"act_fn": "batchtopk"}, "act_fn is 'batchtopk'"),
    ):
        refused(words, write(tmp_path / "moss", base | change, names, "config.json"))


def test_a_site_can_be_given(folder):
    change(folder, metadata={"hook_name": "blocks.5.ln2.hook_normalized"})
    assert nnterp.load_dictionary(folder).reads is None
    given = nnterp.load_dictionary(folder, reads="blocks.2.hook_resid_mid", dtype=torch.float16)
    assert (given.reads, given.writes, given.encoder.dtype) == ("layers_mid[2]", "layers_mid[2]", torch.float16)


@pytest.mark.parametrize(
    ("name", "site"),
    [
        ("blocks.3.hook_resid_post", "layers_output[3]"),
        ("blocks.3.hook_resid_pre", "layers_input[3]"),
        ("blocks.3.attn.hook_z", "attention_head_outputs[3]"),
        ("blocks.3.hook_mlp_out", "mlp_contributions[3]"),
        ("blocks.3.mlp.hook_in", "mlps_input[3]"),
        ("layers_output[3]", "layers_output[3]"),
        ("blocks.3.ln2.hook_normalized", None),
        ("blocks.x", None),
        (None, None),
    ],
)
def test_sites_of_transformer_lens(name, site):
    assert site_of_hook(name) == site


def test_sites_of_modules():
    assert sites_of_module("gpt_neox.layers.2.mlp") == ("mlps_input[2]", "mlps_output[2]")
    assert sites_of_module("layers.2") == ("layers_input[2]", "layers_output[2]")
    assert sites_of_module("layers.2.mlp.fc1") is None
    assert site_of_native("model.layers.7.self_attn.o_proj.input") == "attention_head_outputs[7]"
    assert site_of_native("model.layers.7.output") == "layers_output[7]"
    assert site_of_native("model.norm.output") is None


def test_dictionaries_of_the_hub(tmp_path, monkeypatch):
    """From the hub's cache: only the folder that is asked for, at the commit that the branch stands for."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--owner--saes"
    snapshot = repository / "snapshots" / COMMIT
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    write(snapshot / "layer_5" / "width_16k", cfg("standard"), weights())
    rows = {"W_enc": weights()["W_enc"].T.contiguous(), "W_dec": weights()["W_dec"]}
    rows |= {"b_enc": weights()["b_enc"], "b_dec": weights()["b_dec"]}
    save_file(rows, snapshot / "layer_3.safetensors")
    (snapshot / "config.yaml").write_text("feature_input_hook: mlp.hook_in\nfeature_output_hook: mlp.hook_out\n")
    for revision in (None, "main", COMMIT):
        found = nnterp.load_dictionary("owner/saes", "layer_5/width_16k", revision=revision)
        assert found.source == f"owner/saes@{COMMIT}/layer_5/width_16k"
        assert torch.equal(found.decoder, weights()["W_dec"])
    assert nnterp.load_dictionary("owner/saes", "layer_3.safetensors").writes == "mlps_output[3]"
    assert list(nnterp.load_transcoders("owner/saes")) == [3]
    refused("of owner/saes at revision other", "owner/saes", "layer_5", revision="other")
    refused("has no such folder", "owner/saes", "layer_9")
    refused("is not there, or cannot be reached", "owner/unknown", "layer_5")
    refused("within the repository", "owner/saes", "../../secret")
