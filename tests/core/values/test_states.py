"""States of linear attention and state space layers, against the model's own cache."""

import copy

import pytest
import torch
from nnsight.intervention.interleaver import OutOfOrderError

from nnterp.errors import Unavailable

from .values_reference import ids, wrapped

pytestmark = pytest.mark.filterwarnings("ignore")

TYPES = (
    "bailing_hybrid bamba falcon_h1 falcon_mamba granitemoehybrid jamba kimi_linear mamba mamba2 nemotron_h "
    "olmo_hybrid qwen3_5 qwen3_5_moe qwen3_next qwen4_exp zamba zamba2 zaya minimax"
).split()
NEXT = torch.tensor([[11], [12]])


def cache_of(output):
    cache = getattr(output, "past_key_values", None)
    return output.cache_params if cache is None else cache


def kept(cache, layer):
    """The state of one layer in a cache."""
    if hasattr(cache, "linear_cache"):
        return cache.linear_cache[layer]
    return cache.layers[layer].recurrent_states[0]


def go_on(module, output, cache):
    """The logits of one more token."""
    name = "past_key_values" if getattr(output, "past_key_values", None) is not None else "cache_params"
    with torch.no_grad():
        return module(NEXT, **{name: cache}, use_cache=True).logits


@pytest.mark.parametrize("model_type", TYPES)
def test_states_are_what_the_cache_keeps(model_type):
    model, tokens = wrapped(model_type, eager=False), ids()
    layers = model.support()["mixer_states"]
    assert layers
    with torch.no_grad():
        plain = model._module(tokens, use_cache=True)
    with torch.no_grad(), model.trace(tokens, use_cache=True):
        found = [model.mixer_states[i].clone() for i in layers]
        found.save()
        logits = model.logits.save()
    assert torch.equal(logits, plain.logits)
    for layer, state in zip(layers, found, strict=True):
        assert state.shape[0] == 2
        torch.testing.assert_close(state.to(kept(cache_of(plain), layer)), kept(cache_of(plain), layer))


@pytest.mark.parametrize("model_type", TYPES)
def test_written_states_are_what_the_next_token_goes_on_from(model_type):
    """The next token's logits equal those that a plain model gives with its cache changed; this pass's do not move."""
    model, tokens = wrapped(model_type, eager=False), ids()
    module, layer = model._module, model.support()["mixer_states"][0]
    with torch.no_grad():
        plain = module(tokens, use_cache=True)
    unwritten = go_on(module, plain, copy.deepcopy(cache_of(plain)))
    changed = copy.deepcopy(cache_of(plain))
    kept(changed, layer).mul_(-0.5)
    expected = go_on(module, plain, changed)
    with torch.no_grad(), model.trace(tokens, use_cache=True):
        model.mixer_states[layer] = model.mixer_states[layer] * -0.5
        output = model.output.save()
    assert torch.equal(output.logits, plain.logits)
    torch.testing.assert_close(kept(cache_of(output), layer), kept(cache_of(plain), layer) * -0.5)
    written = go_on(module, output, cache_of(output))
    torch.testing.assert_close(written, expected, atol=1e-5, rtol=1e-4)
    assert (written - unwritten).abs().max() > 1e-5


def test_states_on_the_module():
    """RecurrentGemma keeps its states on its modules."""
    model, tokens = wrapped("recurrent_gemma", eager=False), ids()
    layers = model.support()["mixer_states"]
    assert layers == tuple(i for i in range(model.num_layers) if i not in model.attention_layers)
    units = [model._module.get_submodule(model.anatomy.blocks[i].path).temporal_block.rg_lru for i in layers]
    assert all(unit.recurrent_states is None for unit in units)
    with torch.no_grad(), model.trace(tokens, use_cache=True):
        found = [model.mixer_states[i].clone() for i in layers]
        found.save()
        model.mixer_states[layers[-1]] = found[-1] * 2
    for unit, state in zip(units[:-1], found[:-1], strict=True):
        assert torch.equal(unit.recurrent_states, state)
    assert torch.equal(units[-1].recurrent_states, found[-1] * 2)


def test_where_there_is_none():
    for model_type, why in (("llama", "keys and values"), ("lfm2", "convolution"), ("rwkv", "model.output")):
        model = wrapped(model_type, eager=False)
        assert model.support()["mixer_states"] == ()
        assert any(why in reason for reason in model.support().reasons["mixer_states"].values())
        with pytest.raises(Unavailable, match=why), model.trace(ids()):
            model.mixer_states[0].save()
    model = wrapped("mamba", eager=False)
    with pytest.raises(OutOfOrderError, match="use_cache=True"), torch.no_grad(), model.trace(ids(), use_cache=False):
        model.mixer_states[0].save()
    with pytest.raises(ValueError, match="read them in a trace"):
        model.collect("a", "mixer_states", progress=False)


def test_explained(capsys):
    wrapped("mamba", eager=False).explain("mixer_states", 1)
    shown = capsys.readouterr().out
    assert "update_recurrent_state" in shown
    assert "-->" in shown
