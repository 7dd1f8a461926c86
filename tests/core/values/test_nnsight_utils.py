"""The 1.x functions, on a StandardizedTransformer and on a plain renamed nnsight model."""

import pytest
import torch
from nnsight import TransformersModel

from nnterp import get_rename_dict
from nnterp import nnsight_utils as nu
from nnterp import rename_utils as ru
from nnterp.testing import tiny_model, tiny_tokenizer

from .values_reference import wrapped

PROMPTS = ["The capital of France is", "Hello", "one two three", "A cat sat on the mat"]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def models(request):
    plain = TransformersModel(
        tiny_model(request.param), tokenizer=tiny_tokenizer(), task="text-generation", rename=get_rename_dict()
    )
    return wrapped(request.param, eager=False, check=True), plain


def test_getters(models):
    for model in models:
        hf = model._module
        assert nu.get_num_layers(model) == 4
        assert nu.get_embed_tokens(model)._module is hf.get_input_embeddings()
        assert nu.get_unembed(model)._module is hf.get_output_embeddings()
        assert "norm" in type(nu.get_unembed_norm(model)._module).__name__.lower()
        with torch.no_grad(), model.trace(PROMPTS[0]):
            x = nu.get_layer_input(model, 1).save()
            attention = nu.get_attention_output(model, 1).save()
            mlp = nu.get_mlp_output(model, 1).save()
            y = nu.get_layer_output(model, 1).save()
            last = nu.get_layer_output(model, 3).save()
            logits = nu.get_logits(model).save()
            probs = nu.get_next_token_probs(model).save()
        torch.testing.assert_close(x + attention + mlp, y, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(nu.project_on_vocab(model, last), logits, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(probs, logits[:, -1].softmax(-1))
        assert nu.get_layer(model, 2)._module is nu.get_layers(model)[2]._module
        assert nu.get_attention(model, 2)._module is not nu.get_mlp(model, 2)._module


def test_set_layer_output(models):
    for model in models:
        with torch.no_grad(), model.trace(PROMPTS[0]):
            zeros = torch.zeros_like(nu.get_layer_output(model, 1))
            nu.set_layer_output(model, 1, zeros)
            after = nu.get_layer_input(model, 2).save()
        assert not after.any()


def test_token_activations(models):
    _ours, plain = models
    expected = []
    for prompt in PROMPTS:
        with torch.no_grad(), plain.trace(prompt):
            states = torch.stack([nu.get_layer_output(plain, i)[0, -1] for i in range(4)]).save()
        expected.append(states)
    expected = torch.stack(expected, dim=1)
    for model in models:
        one = nu.get_token_activations(model, PROMPTS)
        batched = nu.collect_token_activations_batched(model, PROMPTS, batch_size=3)
        session = nu.collect_last_token_activations_session(model, PROMPTS, batch_size=3)
        bar = nu.collect_token_activations_batched(model, PROMPTS, batch_size=3, tqdm=lambda x: x, layers=[1, 3])
        assert one.shape == (4, len(PROMPTS), 64)
        for found in (one, batched, session):
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(bar, expected[[1, 3]], atol=1e-4, rtol=1e-4)
        attention = nu.get_token_activations(model, PROMPTS[:2], get_activations=nu.get_attention_output)
        assert attention.shape == (4, 2, 64)
        with torch.no_grad(), model.trace(PROMPTS) as tracer:
            inside = nu.get_token_activations(model, tracer=tracer).save()
        torch.testing.assert_close(inside, one)


def test_refusals(models):
    for model in models:
        with pytest.raises(ValueError, match="prompts"):
            nu.get_token_activations(model)
        with pytest.raises(ValueError, match="padding"):
            nu.get_token_activations(model, PROMPTS, idx=2)


def test_compute_next_token_probs(models):
    for model in models:
        probs = nu.compute_next_token_probs(model, PROMPTS)
        assert probs.shape == (len(PROMPTS), 509)
        torch.testing.assert_close(probs.sum(-1), torch.ones(len(PROMPTS)))


def test_rename_utils():
    model = tiny_model("gemma2")
    assert ru.get_num_attention_heads(model) == 4
    assert ru.get_hidden_size(model) == 64
    assert ru.get_vocab_size(model) == 509
    assert ru.text_config(model) is model.config
    assert ru.get_num_attention_heads(model, rename_config=ru.RenameConfig(attn_head_config_key=7)) == 7
    assert ru.get_num_attention_heads(tiny_model("mamba"), raise_error=False) is None
    with pytest.raises(ValueError, match="RenameConfig"):
        ru.get_num_attention_heads(tiny_model("mamba"))
    from nnterp.errors import RenamingError

    assert ru.RenamingError is RenamingError
