"""Code written for nnterp 1.x: the names it uses on a model, held against the plain HuggingFace module."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import nnsight
import pytest
import torch
from nnsight import TransformersModel
from torch import nn

from nnterp import ModuleAccessor, RenameConfig, StandardizedTransformer, get_rename_dict
from nnterp.errors import AnatomyError, RenamingError
from nnterp.rename_utils import AttnProbFunction
from nnterp.testing import tiny_checkpoint, tiny_model, tiny_tokenizer

IDS = torch.tensor([[5, 9, 12, 7]])
BACKBONES = {  # where the module that holds the layers is
    "gpt2": "transformer",
    "llama": "model",
    "opt": "model",
    "gpt_neox": "gpt_neox",
    "bloom": "transformer",
    "mamba": "backbone",
}


@pytest.mark.parametrize("model_type", BACKBONES)
def test_the_backbone_is_called_model(tiny, model_type):
    model, module = tiny(model_type), tiny_model(model_type)
    assert type(model.model._module) is type(module.get_submodule(BACKBONES[model_type]))
    assert model.model.layers[1]._module is model.layers[1]._module
    assert model.model.ln_final is model.ln_final
    assert model.model.embed_tokens is model.embed_tokens
    with torch.no_grad(), model.trace(IDS):
        direct = model.model.layers[1].output
        direct = nnsight.save(direct if isinstance(direct, torch.Tensor) else direct[0])
        value = model.layers_output[1].save()
    assert torch.equal(direct, value)


@pytest.mark.parametrize("model_type", BACKBONES)
def test_the_backbone_has_its_name_on_plain_nnsight_too(model_type):
    names = get_rename_dict()
    plain = TransformersModel(tiny_model(model_type), task="text-generation", tokenizer=tiny_tokenizer(), rename=names)
    assert plain.model.layers[0]._module is plain.layers[0]._module
    assert plain.model.ln_final is plain.ln_final


@pytest.mark.parametrize("model_type", ["granitemoehybrid", "granitemoeshared", "modernbert-decoder"])
def test_the_rename_dict_gives_no_name_to_two_modules(model_type):
    TransformersModel(
        tiny_model(model_type), task="text-generation", tokenizer=tiny_tokenizer(), rename=get_rename_dict()
    )


def test_the_module_and_the_class(tiny):
    model = tiny("gpt2")
    assert model._model is model._module
    assert isinstance(model, nnsight.LanguageModel)
    model.detect_layer_output_type()
    assert model.layers_output.returns_tuple is False
    assert model.attentions_output.returns_tuple is None


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_modules_of_accessors(tiny, model_type):
    model = tiny(model_type)
    assert model.layers_output.get_module(1) is model.layers[1]
    assert model.layers_input.get_module(-1) is model.layers[model.num_layers - 1]
    assert model.attentions_output.get_module(0) is model.layers[0].self_attn
    assert model.mlps_input.get_module(1) is model.layers[1].mlp
    assert model.attentions.get_module(1) is model.attentions[1]
    with pytest.raises(IndexError):
        model.layers_output.get_module(99)


def test_attention_probabilities_are_disabled_until_they_are_enabled_again():
    model = StandardizedTransformer(tiny_model("llama"), tokenizer=tiny_tokenizer(), enable_attention_probs=True)
    assert model.attention_probabilities.enabled
    model.attention_probabilities.disable()
    assert not model.attention_probabilities.enabled
    assert not model.attn_probs_available
    with pytest.raises(RenamingError, match="disabled"), model.trace(IDS):
        model.attention_probabilities[0].save()
    with pytest.raises(RenamingError, match="disabled"), model.trace(IDS):
        model.attention_probabilities[0] = torch.zeros(1)
    model.attention_probabilities.enabled = True
    with torch.no_grad(), model.trace(IDS):
        probabilities = model.attention_probabilities[0].save()
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(probabilities.shape[:-1]))


def test_a_list_of_candidates_need_not_match():
    module = tiny_model("gpt2")
    config = RenameConfig(
        attn_name=["braid", "self_attn"], mlp_name=["muse"], ln_final_name=["roof"], lm_head_name=["speak"],
        model_name=["torso"], layers_name=["floors"],
    )  # fmt: skip
    model = StandardizedTransformer(module, tokenizer=tiny_tokenizer(), rename_config=config)
    assert model.attentions[0]._module is module.transformer.h[0].attn
    with pytest.raises(AnatomyError, match="braid"):
        StandardizedTransformer(module, tokenizer=tiny_tokenizer(), rename_config=RenameConfig(attn_name="braid"))
    older = StandardizedTransformer(module, tokenizer=tiny_tokenizer(), attn_rename="braid", check_renaming=False)
    assert older.num_layers == model.num_layers


def test_a_class_to_load_with(tmp_path):
    from transformers import AutoModelForCausalLM, GPT2LMHeadModel

    folder = str(tiny_checkpoint("gpt2", tmp_path))
    with torch.no_grad():
        expected = GPT2LMHeadModel.from_pretrained(folder)(IDS).logits
    for automodel in (AutoModelForCausalLM, GPT2LMHeadModel, "GPT2LMHeadModel"):
        model = StandardizedTransformer(folder, automodel=automodel)
        assert type(model._module) is GPT2LMHeadModel
        with torch.no_grad(), model.trace(IDS):
            logits = model.logits.save()
        torch.testing.assert_close(logits, expected)
    with pytest.raises(ValueError, match="automodel='Nothing'"):
        StandardizedTransformer(folder, automodel="Nothing")


def test_a_module_accessor_shows_nnsights_tree():
    module = tiny_model("gpt2")
    accessor = ModuleAccessor(module)
    assert accessor.nn_model.layers[1]._module is module.transformer.h[1]
    assert accessor.nn_model.model._module is module.transformer is accessor.model
    assert accessor.get_attention(0) is accessor.nn_model.layers[0].self_attn._module


def test_modules_that_other_libraries_import(tiny, capsys):
    from nnterp import rename_utils
    from nnterp.logging import logger
    from nnterp.utils import display_source, try_with_scan

    assert logger.name == "nnterp"
    display_source("x = 1")
    assert "x = 1" in capsys.readouterr().out
    shapes = []
    assert try_with_scan(tiny("llama"), lambda: shapes.append(tiny("llama").layers_output[0].shape), ValueError("no"))
    assert shapes[0][-1] == tiny("llama").hidden_size
    assert "model.transformer.layers" in rename_utils.LAYER_NAMES
    assert "wte" in rename_utils.EMBED_TOKENS_NAMES
    assert [c.__name__ for c in rename_utils.IGNORE_MLP_MODELS] == ["OPTForCausalLM"]
    assert rename_utils.get_ignores(tiny("opt")._model) == ["mlp"]
    assert rename_utils.get_ignores(tiny("llama")._model, RenameConfig(ignore_attn=True)) == ["attention"]


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "opt", "bloom"])
def test_the_checks_of_shapes(tiny, model_type):
    from nnterp.rename_utils import check_model_renaming, get_ignores

    model = tiny(model_type)
    check_model_renaming(model, model_type, get_ignores(model._model), allow_dispatch=True)


def test_the_checks_of_shapes_find_a_wrong_size(tiny):
    from nnterp.rename_utils import check_model_renaming

    config = RenameConfig(hidden_size_config_key=48)
    model = StandardizedTransformer(
        tiny_model("llama"), tokenizer=tiny_tokenizer(), rename_config=config, check_renaming=False
    )
    with pytest.raises(ValueError, match=r"it should be \[1, 3, 48\]"):
        check_model_renaming(model, "llama", [], allow_dispatch=True)


def test_two_spellings_of_positions_at_once(tiny):
    model = tiny("llama")
    with pytest.raises(ValueError, match="Cannot specify both"), model.trace(IDS):
        model.steer(layers=0, steering_vector=torch.ones(model.hidden_size), positions=0, token_positions=0)


# -- a module that is not HuggingFace's --------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out, self.drop = nn.Linear(width, 3 * width), nn.Linear(width, width), nn.Dropout(0.0)

    def forward(self, x):
        batch, seq, width = x.shape
        query, key, value = self.qkv(x).view(batch, seq, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        scores = query @ key.transpose(-1, -2) / (width // self.heads) ** 0.5
        scores = scores.masked_fill(torch.ones(seq, seq, dtype=torch.bool).triu(1), -1e9)
        probabilities = self.drop(scores.softmax(-1))
        return self.out((probabilities @ value).transpose(1, 2).reshape(batch, seq, width))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        x = x + self.attn(x)
        return x + self.mlp(x)


class Course(nn.Module):
    """A transformer of a course: its own config, token ids in, a bare tensor of logits out."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(d_model=16, n_heads=4, vocab_size=50)
        self.embed = nn.Embedding(50, 16)
        self.blocks = nn.ModuleList([Block(16, 4) for _ in range(3)])
        self.unembed = nn.Linear(16, 50, bias=False)

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return self.unembed(x)


class Source(AttnProbFunction):
    def get_attention_prob_source(self, attention_module, return_module_source=False):
        source = attention_module.source
        return source if return_module_source else source.self_drop_0


COURSE = RenameConfig(
    layers_name="blocks", attn_name="attn", mlp_name="mlp", ln_final_name=None, lm_head_name="unembed",
    attn_prob_source=Source(),
)  # fmt: skip


@pytest.fixture(scope="module")
def course():
    torch.manual_seed(0)
    return Course()


@pytest.mark.parametrize("check_renaming", [False, True])
def test_a_module_that_is_not_huggingfaces(course, check_renaming):
    model = StandardizedTransformer(course, rename_config=COURSE, device_map=None, check_renaming=check_renaming)
    assert (model.num_layers, model.num_heads, model.hidden_size, model.vocab_size) == (3, 4, 16, 50)
    kept = []
    handle = course.blocks[1].register_forward_hook(lambda _module, _given, made: kept.append(made))
    with torch.no_grad():
        expected = course(IDS)
        handle.remove()
        with model.trace(IDS):
            probabilities = model.attention_probabilities[0].save()
            stream = model.layers_output[1].save()
            output = model.output.save()
        with model.trace(IDS):
            model.logits = 2 * model.logits
            doubled = model.output.save()
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(1, 4, 4))
    assert torch.equal(stream, kept[0])
    assert torch.equal(output, expected)
    assert torch.equal(doubled, 2 * expected)
    if check_renaming:
        assert model.certificate is not None
        assert model.certificate.ok


def test_functions_on_a_module_that_is_not_huggingfaces(course):
    model = StandardizedTransformer(course, rename_config=COURSE)
    streams = model.collect(IDS, "layers_output")["layers_output"]
    with torch.no_grad():
        stream = course.embed(IDS)
        for i, block in enumerate(course.blocks):
            stream = block(stream)
            torch.testing.assert_close(streams[i], stream)
        with model.trace(IDS):
            model.layers_output[0] = torch.zeros_like(model.layers_output[0])
            written = model.logits.save()
        expected = course.unembed(course.blocks[2](course.blocks[1](torch.zeros(1, 4, 16))))
    torch.testing.assert_close(written, expected)
    with pytest.raises(ValueError, match="no tokenizer"):
        model.collect("a text", "layers_output")
    with pytest.raises(ValueError, match="no tokenizer"), model.trace("a text"):
        model.logits.save()


def test_texts_for_a_module_that_is_not_huggingfaces():
    torch.manual_seed(0)
    course = Course()
    course.embed, course.unembed = nn.Embedding(512, 16), nn.Linear(16, 512, bias=False)
    course.config.vocab_size = 512
    tokenizer = tiny_tokenizer()
    model = StandardizedTransformer(course, rename_config=COURSE, tokenizer=tokenizer)
    with torch.no_grad(), model.trace("The cat"):
        logits = model.logits.save()
    with torch.no_grad():
        torch.testing.assert_close(logits, course(tokenizer("The cat", return_tensors="pt").input_ids))


def test_loading_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        StandardizedTransformer(tiny_model("gpt2"), tokenizer=tiny_tokenizer())
