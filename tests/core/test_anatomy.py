"""Finding parts: by structure, by the user's names, and errors that say which names to give."""

import shutil
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from nnterp import ModuleAccessor, RenameConfig, StandardizedTransformer, get_rename_dict
from nnterp.anatomy import find_anatomy
from nnterp.errors import AnatomyError, CertificateError, RenamingError, Unavailable
from nnterp.testing import tiny_model, tiny_tokenizer

from . import odd_modeling

ODD_NAMES = RenameConfig(
    attn_name="braid",
    mlp_name="muse",
    ln_final_name="roof",
    lm_head_name="speak",
    attn_head_config_key="beams",
    hidden_size_config_key="width",
    vocab_size_config_key="words",
)


def odd_model():
    torch.manual_seed(0)
    model = odd_modeling.OddForCausalLM(odd_modeling.OddConfig()).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def test_unknown_architecture_loads_with_names_alone():
    model = StandardizedTransformer(odd_model(), tokenizer=tiny_tokenizer(), rename_config=ODD_NAMES)
    assert model.certificate.ok
    assert (model.num_layers, model.hidden_size, model.num_heads, model.vocab_size) == (3, 32, 4, 509)
    with model.trace("Hello there"):
        attention = model.attentions_output[1].save()
        stream = model.layers_output[-1].save()
        logits = model.logits.save()
    assert attention.shape == stream.shape
    torch.testing.assert_close(model.project_on_vocab(stream), logits)
    assert model.layers[1].self_attn is model.tower.storeys[1].braid


def test_unknown_architecture_without_names_says_which_fields_to_give():
    with pytest.raises(AnatomyError) as caught:
        StandardizedTransformer(odd_model(), tokenizer=tiny_tokenizer())
    message = str(caught.value)
    assert "RenameConfig(" in message
    for field in ("attn_name", "mlp_name", "lm_head_name"):
        assert field in message
    for name in ("braid (Weaver)", "muse (Ponder)", "speak (Linear)"):
        assert name in message
    assert "layers_name=" not in message  # the one list of layers is found by structure


def test_each_missing_name_is_asked_for_alone():
    names = {"attn_name": "braid", "mlp_name": "muse", "lm_head_name": "speak"}
    for field in names:
        given = {k: v for k, v in names.items() if k != field}
        with pytest.raises(AnatomyError, match=field) as caught:
            StandardizedTransformer(odd_model(), tokenizer=tiny_tokenizer(), rename_config=RenameConfig(**given))
        assert not any(f"{other}=..." in str(caught.value) for other in given)


def test_final_norm_is_found_by_the_order_in_which_modules_run():
    config = RenameConfig(attn_name="braid", mlp_name="muse", lm_head_name="speak")
    model = StandardizedTransformer(odd_model(), tokenizer=tiny_tokenizer(), rename_config=config)
    assert model.anatomy.ln_final == "tower.roof"
    assert model.ln_final is model.tower.roof


def test_remote_code_folder(tmp_path):
    module = odd_model()
    module.config.auto_map = {
        "AutoConfig": "odd_modeling.OddConfig",
        "AutoModelForCausalLM": "odd_modeling.OddForCausalLM",
    }
    module.config.architectures = ["OddForCausalLM"]
    module.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    shutil.copy(Path(odd_modeling.__file__), tmp_path / "odd_modeling.py")
    model = StandardizedTransformer(tmp_path, trust_remote_code=True, rename_config=ODD_NAMES)
    model.dispatch()
    assert model.certificate.ok
    assert model.certificate.complete
    ids = model.tokenizer("Hello there", return_tensors="pt").input_ids
    with model.trace("Hello there"):
        logits = model.logits.save()
    torch.testing.assert_close(logits, module(ids).logits)
    with pytest.raises(AnatomyError, match="attn_name"):
        StandardizedTransformer(tmp_path, trust_remote_code=True)


@pytest.mark.parametrize(
    ("field", "name", "shown"),
    [
        ("attn_name", "self_atn", "self_attn"),
        ("mlp_name", "mpl", "mlp"),
        ("ln_final_name", "model.nrom", "norm"),
        ("lm_head_name", "lm_haed", "lm_head"),
        ("layers_name", "model.layer", "layers"),
        ("model_name", "modle", "model"),
    ],
)
def test_a_name_that_matches_nothing_shows_what_is_close(field, name, shown):
    with pytest.raises(RenamingError) as caught:
        StandardizedTransformer(
            tiny_model("llama"), tokenizer=tiny_tokenizer(), rename_config=RenameConfig(**{field: name})
        )
    assert f"RenameConfig({field}={name!r}) matches nothing" in str(caught.value)
    assert shown in str(caught.value)


def test_names_may_be_lists_and_dotted_paths():
    config = RenameConfig(attn_name=["nope", "self_attn"], ln_final_name="model.norm", layers_name="model.layers")
    model = StandardizedTransformer(tiny_model("llama"), tokenizer=tiny_tokenizer(), rename_config=config)
    assert model.anatomy.ln_final == "model.norm"


def test_ignored_parts_are_unavailable_with_the_reason():
    config = RenameConfig(ignore_mlp=True)
    model = StandardizedTransformer(
        tiny_model("llama"), tokenizer=tiny_tokenizer(), rename_config=config, check_renaming=False
    )
    with pytest.raises(Unavailable, match="ignore_mlp"), model.trace("Hello"):
        model.mlps_output[0].save()


def test_heterogeneous_stack_says_what_each_layer_is(tiny):
    model = tiny("jamba")
    anatomy = model.anatomy
    kinds = {block.kind for block in anatomy.blocks}
    assert kinds == {"attention", "state_space"}
    assert {block.mixture_of_experts for block in anatomy.blocks} == {True, False}
    with_attention = model.attention_layers
    assert with_attention == tuple(b.index for b in anatomy.blocks if b.kind == "attention")
    without = next(i for i in range(model.num_layers) if i not in with_attention)
    with pytest.raises(Unavailable) as caught, model.trace("Hello there"):
        model.attentions_output[without].save()
    message = str(caught.value)
    assert f"Layer {without}" in message
    assert "state space" in message
    assert str(with_attention[0]) in message
    assert isinstance(caught.value, RenamingError)
    with model.trace("Hello there"):
        mixed = model.mixers_output[without].save()
    assert mixed.shape[-1] == model.hidden_size


def test_every_kind_of_mixer_is_told_apart(tiny):
    found = {
        t: {b.kind for b in tiny(t).anatomy.blocks}
        for t in ("qwen3_next", "lfm2", "rwkv", "mamba", "falcon_h1", "mllama")
    }
    assert found["qwen3_next"] == {"linear_attention", "attention"}
    assert found["lfm2"] == {"convolution", "attention"}
    assert found["rwkv"] == {"recurrent"}
    assert found["mamba"] == {"state_space"}
    assert found["falcon_h1"] == {"state_space"}
    assert found["mllama"] == {"cross_attention", "attention"}
    falcon = tiny("falcon_h1")
    assert falcon.attention_layers == tuple(range(falcon.num_layers))


def test_feed_forward_without_a_module_still_has_values(tiny):
    model = tiny("opt")
    with pytest.raises(Unavailable, match="fc1"):
        model.mlps[0]
    with model.trace("Hello there"):
        given = model.mlps_input[0].save()
        made = model.mlps_output[0].save()
    fc1 = model._module.model.decoder.layers[0].fc1
    fc2 = model._module.model.decoder.layers[0].fc2
    torch.testing.assert_close(fc2(torch.relu(fc1(given.float()))).reshape(made.shape), made)


def test_anatomy_prints_standard_beside_native_names():
    text = str(find_anatomy(tiny_model("gpt2")))
    for name in (
        "embed_tokens",
        "transformer.wte",
        "transformer.h.*.attn",
        "transformer.ln_f",
        "lm_head",
        "hidden_size 64",
    ):
        assert name in text


def test_anatomy_is_immutable_and_absent_parts_have_reasons():
    anatomy = find_anatomy(tiny_model("openai-gpt"))
    with pytest.raises(AttributeError):
        anatomy.ln_final = "x"  # type: ignore[misc]
    assert anatomy.ln_final is None
    assert "norm" in anatomy.absent["ln_final"]


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "opt", "bloom", "gpt_neox", "mamba", "bert"])
def test_module_accessor_gives_the_modules_of_the_plain_model(model_type, tiny):
    module = tiny_model(model_type)
    accessor = ModuleAccessor(module)
    anatomy = find_anatomy(module)
    assert accessor.get_layers() is module.get_submodule(anatomy.layers)
    assert accessor.get_unembed() is module.get_submodule(anatomy.lm_head)
    assert accessor.get_embed_tokens() is module.get_input_embeddings()
    if anatomy.indices("self_attn"):
        assert accessor.get_attention(-1) is module.get_submodule(anatomy.blocks[-1].self_attn.path)
    assert accessor.config is module.config
    with pytest.raises(IndexError, match="layers"):
        accessor.get_attention(99)


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "gpt_neox", "opt", "bloom", "gptj"])
def test_rename_dict_serves_plain_nnsight(model_type):
    from nnsight import TransformersModel

    module = tiny_model(model_type)
    model = TransformersModel(module, tokenizer=tiny_tokenizer(), task="text-generation", rename=get_rename_dict())
    anatomy = find_anatomy(module)
    assert model.layers.path == f"model.{anatomy.layers}"
    assert model.layers[0].self_attn.path == f"model.{anatomy.blocks[0].self_attn.path}"


def test_a_model_that_huggingface_cannot_run_says_so():
    module = tiny_model("gpt2")
    module.transformer.h[1].mlp.forward = lambda x: x.no_such_thing
    said = r"forward pass fails on \d+ tokens of text:\nAttributeError: .*no_such_thing"
    with pytest.raises(RenamingError, match=said):
        StandardizedTransformer(module, tokenizer=tiny_tokenizer())


def test_wrong_names_fail_the_certificate_and_check_renaming_skips_it():
    wrong = RenameConfig(attn_name="mlp", mlp_name="self_attn")
    with pytest.raises(CertificateError, match="position"):
        StandardizedTransformer(tiny_model("llama"), tokenizer=tiny_tokenizer(), rename_config=wrong)
    model = StandardizedTransformer(
        tiny_model("llama"), tokenizer=tiny_tokenizer(), rename_config=wrong, check_renaming=False
    )
    assert model.certificate is None
    assert not model.validate().ok


def test_multimodal_text_tower_is_found(tiny):
    model = tiny("gemma3")
    assert model.anatomy.layers == "model.language_model.layers"
    assert model.certificate.ok


@pytest.mark.parametrize(
    ("model_type", "unstated"),
    [
        ("gpt2", {"n_inner": None}),
        ("gptj", {"n_inner": None}),
        ("gpt_bigcode", {"n_inner": None}),
        ("gpt_neo", {"intermediate_size": None}),
        ("bloom", {}),
        ("mpt", {}),
        ("openai-gpt", {}),
        ("ctrl", {}),
        ("xlstm", {}),
    ],
)
def test_the_width_of_the_feed_forward_is_read_off_its_weights(model_type, unstated):
    """Configs that do not state it, in matrices either way round: as many as there are neurons."""
    model = StandardizedTransformer(tiny_model(model_type, **unstated), tokenizer=tiny_tokenizer())
    with torch.no_grad(), model.trace(torch.arange(20, 26)[None]):
        neurons = model.mlp_neurons[0].save()
    assert model.intermediate_size == neurons.shape[-1]


def test_feed_forwards_of_several_widths_have_no_one_width():
    module = tiny_model("mpt")
    ffn = module.transformer.blocks[1].ffn
    ffn.up_proj, ffn.down_proj = nn.Linear(64, 32, bias=False), nn.Linear(32, 64, bias=False)
    assert find_anatomy(module).sizes.intermediate_size is None


@pytest.mark.parametrize(
    ("model_type", "options", "expected"),
    [
        ("falcon", {"multi_query": True, "num_kv_heads": 4}, 1),  # as Falcon-7B, whose config holds 71
        ("falcon", {"multi_query": False, "num_kv_heads": 4}, 4),
        ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}, 2),  # as Falcon-40B
        ("gpt_bigcode", {"multi_query": True}, 1),
        ("gpt_bigcode", {"multi_query": False}, 4),
    ],
)
def test_one_key_head_for_all_is_counted_as_one(model_type, options, expected):
    """The width of the projection is the reference: queries, keys and values of one model type side by side."""
    module = tiny_model(model_type, **options)
    sizes = find_anatomy(module).sizes
    path = "self_attention.query_key_value" if model_type == "falcon" else "attn.c_attn"
    made = module.transformer.h[0].get_submodule(path).out_features
    assert sizes.num_kv_heads == expected == (made // sizes.head_dim - sizes.num_heads) // 2


@pytest.mark.parametrize("name", ["Musicgen", "MusicgenMelody"])
def test_rows_that_are_read_as_one_sequence_are_refused(name):
    """Built from its decoder's config, it runs; rows of codes are no rows of its stream."""
    config = getattr(transformers, f"{name}DecoderConfig")(
        vocab_size=64,
        num_hidden_layers=2,
        ffn_dim=96,
        num_attention_heads=4,
        hidden_size=64,
        max_position_embeddings=64,
    )
    module = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        made = module(input_ids=torch.arange(32).view(4, 8), output_hidden_states=True)
    assert made.logits.shape[0] == 4
    assert made.hidden_states[1].shape[0] == 1
    with pytest.raises(AnatomyError, match=r"4 tables .* rows of its input are no rows"):
        StandardizedTransformer(module, tokenizer=tiny_tokenizer())
