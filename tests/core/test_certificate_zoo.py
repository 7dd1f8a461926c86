"""Every causal language model that transformers has: proven, or refused with the reason."""

import re

import pytest
import torch
from torch import nn

from nnterp import RenameConfig, StandardizedTransformer
from nnterp.anatomy import find_anatomy
from nnterp.certificate import CONSECUTIVE, FILLED, HIDDEN, IDENTITY, PADDING, READOUT, certify
from nnterp.errors import RenamingError
from nnterp.testing import LEFT_PADDING_INEXACT, model_types, multimodal_model_types, tiny_model, tiny_tokenizer

from ..looped_modeling import LOOPED

REFUSED = {
    "reformer": "reversible residuals",
    "xlm": "parts of its layers in separate lists",
}

# Layers that combine their parts otherwise than by adding multiples of them to one stream.
NO_SUM = {
    "deepseek_v4": "hyper-connections",
    "dory": "interpolation towards what a part returns",
    "gemma3n_text": "alternating updates of several streams",
    "glm5_next": "hyper-connections",
    "hy_v4": "hyper-connections",
    "hy_v4_vl": "hyper-connections",
    "inkling2": "attention over earlier streams",
    "inkling2_loop": "attention over earlier streams",
    "inkling2_loop_text": "attention over earlier streams",
    "inkling2_text": "attention over earlier streams",
    "longcat_flash": "two attentions and three feed-forwards in a layer",
    "qwen4_exp": "hyper-connections",
    "qwen4_exp_text": "hyper-connections",
    "xmod": "language adapters",
}

# Models that mix the streams of all layers before the head.
NO_READOUT = {"inkling2", "inkling2_loop", "inkling2_loop_text", "inkling2_text"}

LINES = 10


@pytest.mark.parametrize("model_type", [*model_types(), *multimodal_model_types()])
def test_certificate_holds_or_the_model_is_refused(model_type, tiny):
    if model_type in REFUSED:
        with pytest.raises(RenamingError, match=REFUSED[model_type]):
            tiny(model_type)
        return
    model = tiny(model_type)
    certificate = model.certificate
    assert certificate.ok
    assert certificate.complete
    assert len(certificate.lines) == LINES + (model_type in LOOPED)  # one line more, about passes
    skipped = {line.name for line in certificate.lines if line.status == "skipped"}
    expected = set()
    if model_type in NO_SUM:
        expected.add(IDENTITY)
    if model_type in NO_READOUT:
        expected.add(READOUT)
    assert skipped - {PADDING, HIDDEN, FILLED} == expected
    assert certificate[HIDDEN].status == "passed"
    assert model.padding_is_exact == (PADDING not in skipped)
    if model_type not in LEFT_PADDING_INEXACT:
        assert model.padding_is_exact


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "gemma2", "qwen3_next", "jamba", "bert"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_certificate_holds_in_half_precision(model_type, dtype):
    model = StandardizedTransformer(tiny_model(model_type, dtype=dtype), tokenizer=tiny_tokenizer())
    assert model.certificate.ok
    assert model.certificate.dtype == str(dtype).removeprefix("torch.")


def test_certificate_prints_saves_and_loads(tmp_path, tiny):
    certificate = tiny("llama").certificate
    certificate.save(tmp_path / "certificate.json")
    assert type(certificate).load(tmp_path / "certificate.json") == certificate
    text = str(certificate)
    for line in certificate.lines:
        assert line.name in text
    assert certificate.versions["transformers"] in text
    assert certificate["project_on_vocab"].error <= certificate["project_on_vocab"].tolerance


def test_what_was_written_alone_and_what_only_together_is_named(toy, monkeypatch):
    few = toy.certificate["every write"].detail
    total, alone, together = map(int, re.match(r"(\d+) values: (\d+) written alone, (\d+) only together", few).groups())
    assert (total, alone + together) == (66, 66)
    assert len(written(few)) == together

    monkeypatch.setattr("nnterp.certificate._certify.is_large", lambda module: True)
    many = certify(toy)[0]["every write"]
    assert many.status == "passed"
    total, together, alone = map(
        int, re.match(r"(\d+) values: (\d+) written only together, (\d+)", many.detail).groups()
    )
    assert (total, alone + together) == (66, 66)
    names = [name for name, _ in written(many.detail)]
    assert len(names) == len(set(names)) == alone, "each kind of value is written alone at one layer"
    assert {name for name, _ in written(few)} <= set(names)
    layers = [layer for _, layer in written(many.detail) if layer is not None]
    assert min(layers) < toy.num_layers / 4 < 3 * toy.num_layers / 4 <= max(layers)


def written(detail):
    """(name, layer) of each value that a line lists, layer None for what the model has once."""
    found = []
    for name, layers in re.findall(r"([a-z_]+)(?:\[([\d–, ]+)\])?(?:, |$)", detail.rpartition(": ")[2]):
        for piece in layers.split(", ") if layers else [""]:
            first, _, last = piece.partition("–")
            found += [(name, i) for i in range(int(first), int(last or first) + 1)] if first else [(name, None)]
    return found


def test_certificate_sees_a_broken_model(tiny):
    """A model whose norm is replaced behind nnterp's back no longer proves."""
    module = tiny_model("llama", seed=3)
    model = StandardizedTransformer(module, tokenizer=tiny_tokenizer())
    assert model.validate().ok
    head = module.lm_head
    module.lm_head.register_forward_hook(lambda m, a, out: out.flip(-1) if m is head else out)
    assert model.validate().ok  # the head itself changed: still the model's own head
    module.register_forward_hook(lambda m, a, out: type(out)(**{**out, "logits": out.logits.flip(-1)}))
    assert not model.validate().ok


def test_training_mode_is_given_back():
    module = tiny_model("gpt2", seed=5).train()
    module.transformer.h[0].attn.eval()
    before = [m.training for m in module.modules()]
    StandardizedTransformer(module, tokenizer=tiny_tokenizer())
    assert [m.training for m in module.modules()] == before


def test_of_several_stacks_the_one_that_makes_the_logits_is_named():
    """BLT: bytes are encoded, patches transformed, and a decoder over bytes makes the logits."""
    model = StandardizedTransformer(
        tiny_model("blt", decoder_config={"intermediate_size": 72}), tokenizer=tiny_tokenizer()
    )
    anatomy = model.anatomy
    assert anatomy.layers == "model.local_decoder.layers"
    assert anatomy.other_stacks == ("model.local_encoder.layers", "model.global_transformer.layers")
    assert anatomy.between == tuple(f"model.local_decoder.cross_attn_layers.{i}" for i in (1, 2, 3))
    assert model.intermediate_size == 72
    assert "model.local_decoder.cross_attn_layers.*" in model.certificate[CONSECUTIVE].detail
    assert "model.global_transformer.layers  (before these layers" in str(anatomy)
    with torch.no_grad(), model.trace(torch.arange(20, 32)[None]):  # native names reach the other stacks
        patches = model.model.global_transformer.layers[-1].output.save()
        added = model.model.local_decoder.cross_attn_layers[1].output[0].save()
        read = model.layers_input[1].save()
    assert patches.shape[-1] == 64
    with torch.no_grad(), model.trace(torch.arange(20, 32)[None]):
        written = model.layers_output[0].save()
    torch.testing.assert_close(read, written + added)


@pytest.mark.parametrize("stack", ["local_encoder", "global_transformer", "patcher"])
def test_another_stack_is_not_taken_for_it(stack):
    with pytest.raises(RenamingError):
        StandardizedTransformer(
            tiny_model("blt"),
            tokenizer=tiny_tokenizer(),
            rename_config=RenameConfig(layers_name=f"model.{stack}.layers"),
        )


@pytest.mark.parametrize("model_type", ["mamba", "nemotron_h", "gpt2", "blt"])
def test_a_layer_left_out_is_not_what_is_added_between_layers(model_type):
    module = tiny_model(model_type)
    layers = module.get_submodule(find_anatomy(module).layers)
    module.add_module("gapped", nn.ModuleList([layers[0], *layers[2:]]))
    with pytest.raises(RenamingError, match="each layer reads what the layer before it wrote"):
        StandardizedTransformer(module, tokenizer=tiny_tokenizer(), rename_config=RenameConfig(layers_name="gapped"))
