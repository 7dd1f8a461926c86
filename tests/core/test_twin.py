"""What a narrow twin proves, without the weights, is what the weights prove; and nothing is guessed where it cannot."""

import nnsight
import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from nnterp import StandardizedTransformer
from nnterp.errors import Unavailable
from nnterp.testing import tiny_checkpoint, tiny_tokenizer
from nnterp.values import VALUES

pytestmark = pytest.mark.slow

# One of every build: fused and split projections, grouped heads, latent attention, experts, hybrids, odd layouts.
TYPES = """
afmoe bart bert bloom codegen cohere2 deepseek_v3 deepseek_v4 diffllama falcon falcon_h1 gemma2 gemma3_text
gemma3n_text glm4 gpt2 gpt_bigcode gpt_neo gpt_neox gpt_oss gptj granite jamba lfm2 llama llama4_text
longcat_flash mamba mamba2 mixtral mpt nemotron_h olmo2 openai-gpt opt phi phi3 qwen2_moe qwen3 qwen3_next
recurrent_gemma roberta rwkv stablelm xglm xlnet zamba2
""".split()

LEARNED = ("contributions", "layers_mid")


def places(model):
    """Where every value of every layer is, in words; None where it is not."""
    found = {}
    for value in VALUES.values():
        for layer in range(model.num_layers) if value.per_layer else [None]:
            try:
                found[value.name, layer] = str(model.place(value.name, layer))
            except Unavailable:
                found[value.name, layer] = None
    return found


@pytest.mark.parametrize("model_type", TYPES)
def test_it_proves_what_the_weights_prove(model_type, tmp_path):
    folder = tiny_checkpoint(model_type, tmp_path)
    eager = model_type not in ("mamba", "mamba2", "rwkv")
    without = StandardizedTransformer(folder, remote=True, enable_attention_probs=eager)
    assert not isinstance(without.twin, str), without.twin
    without.learn_from_twin()
    told = places(without)
    assert not without.dispatched
    there = StandardizedTransformer(folder, enable_attention_probs=eager, dispatch=True)
    proven = places(there)
    for key, place in told.items():
        learned = place is None and key[0].endswith(LEARNED)
        assert place == proven[key] or learned, (key, place, proven[key])
    assert without.padding_is_exact == there.padding_is_exact
    assert without.positions_from_mask == there.positions_from_mask
    assert without.readout.way == there.readout.way
    assert str(without.readout) == str(there.readout)
    assert without.readout.returns == there.readout.returns
    assert without.readout.layout == there.readout.layout
    assert [s.kind for s in without.residual_structures] == [s.kind for s in there.residual_structures]


def as_published(model_type, folder):
    """A folder with the configuration of a model of the size it is published in, and no weights."""
    config = CONFIG_MAPPING[model_type]()
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]]
    config.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("model_type", ["gpt2", "gemma2", "falcon_h1", "phi", "mamba2"])
def test_a_model_of_full_size_has_a_twin_that_runs_here(model_type, tmp_path):
    model = StandardizedTransformer(as_published(model_type, tmp_path), remote=True)
    twin = model.twin
    assert not isinstance(twin, str), twin
    assert twin.certificate.ok
    assert twin.certificate.complete
    assert twin.model.num_layers == model.num_layers
    assert twin.model.num_heads == model.num_heads
    assert sum(p.numel() for p in twin.model._module.parameters()) < 1e8
    last = model.num_layers - 1
    assert model.place("layers_output", last) == twin.model.place("layers_output", last)
    assert model.place("mixers_output", last) == twin.model.place("mixers_output", last)
    assert all(p.device.type == "meta" for p in model._module.parameters())


def test_a_learned_factor_is_left_to_the_weights(tmp_path):
    """Gemma 4 scales what leaves a layer by a buffer of the checkpoint."""
    model = StandardizedTransformer(tiny_checkpoint("gemma4_text", tmp_path), remote=True)
    for layer in range(model.num_layers):
        with pytest.raises(Unavailable, match="learned"):
            model.place("mlp_contributions", layer)


def test_without_a_twin_nothing_is_guessed(tmp_path):
    folder = tiny_checkpoint("bloom", tmp_path)
    model = StandardizedTransformer(folder, remote=True)
    model._twins.append("the twin was not built")
    with pytest.raises(Unavailable, match="the twin was not built"):
        model.place("attention_keys", 0)
    with pytest.raises(Unavailable, match="the twin was not built"):
        model.place("attention_contributions", 0)
    assert str(model.place("layers_output", 0)) == "transformer.h.0.output"  # a module's edge needs no numbers
    assert not model.padding_is_exact
    with pytest.raises(Unavailable, match="the twin was not built"):
        model.readout.project(model._module, torch.zeros(1, model.hidden_size))


def test_the_random_state_is_left_alone(tmp_path):
    model = StandardizedTransformer(tiny_checkpoint("gpt2", tmp_path), remote=True)
    before = torch.random.get_rng_state()
    assert not isinstance(model.twin, str)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_shapes_are_found_without_weights_as_well(tmp_path):
    folder = tiny_checkpoint("llama", tmp_path)
    model = StandardizedTransformer(folder)
    with model.scan("The capital of France is"):
        queries = nnsight.save(tuple(model.attention_queries[1].shape))
        heads = nnsight.save(tuple(model.attention_head_outputs[1].shape))
    assert not model.dispatched
    config = AutoConfig.from_pretrained(folder)
    assert queries[2:] == (config.num_attention_heads, config.head_dim)
    assert heads == queries
