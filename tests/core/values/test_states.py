"""States of linear attention and state space layers, against the model's own cache."""

import copy

import pytest
import torch
from nnsight.intervention.interleaver import OutOfOrderError

from nnterp.errors import Unavailable

from .values_reference import ids, unproven, wrapped

pytestmark = pytest.mark.filterwarnings("ignore")

TYPES = (
    "bailing_hybrid bamba falcon_h1 falcon_mamba granitemoehybrid jamba kimi_linear mamba mamba2 nemotron_h "
    "olmo_hybrid qwen3_5 qwen3_5_moe qwen3_next qwen4_exp zamba zamba2 zaya minimax"
).split()
NEXT = torch.tensor([[11], [12]])


def cache_of(output):
    return output[cache_name(output)]


def cache_name(output):
    """What a model calls its cache: "cache" from transformers 5.24 on."""
    return next(name for name in ("cache", "past_key_values", "cache_params") if output.get(name) is not None)


def kept(cache, layer):
    """The state of one layer in a cache."""
    if hasattr(cache, "linear_cache"):
        return cache.linear_cache[layer]
    return cache.layers[layer].recurrent_states[0]


def go_on(module, output, cache):
    """The logits of one more token."""
    with torch.no_grad():
        return module(NEXT, **{cache_name(output): cache}, use_cache=True).logits


@pytest.mark.parametrize("model_type", TYPES)
def test_states_are_what_the_cache_keeps(model_type):
    model, tokens = wrapped(model_type), ids()
    layers = model.support()["mixer_states"]
    assert layers
    with torch.no_grad():
        plain = model._module(tokens, use_cache=True)
    with torch.no_grad(), model.trace(tokens, use_cache=True):
        found = [model.mixer_states[i].clone() for i in layers]
        found.save()
        after = model.mixers_output[layers[-1]].save()  # a state does not stand in the way of what comes after it
        logits = model.logits.save()
    assert torch.equal(logits, plain.logits)
    assert after.shape[:2] == tokens.shape
    for layer, state in zip(layers, found, strict=True):
        assert state.shape[0] == 2
        torch.testing.assert_close(state.to(kept(cache_of(plain), layer)), kept(cache_of(plain), layer))


@pytest.mark.parametrize("model_type", TYPES)
def test_written_states_are_what_the_next_token_goes_on_from(model_type):
    """The next token's logits equal those that a plain model gives with its cache changed; this pass's do not move."""
    model, tokens = wrapped(model_type), ids()
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
    model, tokens = unproven.__wrapped__("recurrent_gemma", eager=False), ids()  # one that nothing was run on yet
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
        model = wrapped(model_type)
        assert model.support()["mixer_states"] == ()
        assert any(why in reason for reason in model.support().reasons["mixer_states"].values())
        with pytest.raises(Unavailable, match=why), model.trace(ids()):
            model.mixer_states[0].save()
    model = wrapped("mamba", eager=False)
    with pytest.raises(Unavailable, match="use_cache=True"), torch.no_grad(), model.trace(ids(), use_cache=False):
        model.mixer_states[0].save()
    model = wrapped("minimax", eager=False)
    with pytest.raises(OutOfOrderError, match="use_cache=True"), torch.no_grad(), model.trace(ids(), use_cache=False):
        model.mixer_states[1].save()
    with pytest.raises(ValueError, match="read them in a trace"):
        model.collect("a", "mixer_states", progress=False)


def test_explained(capsys):
    wrapped("mamba", eager=False).explain("mixer_states", 1)
    shown = capsys.readouterr().out
    assert "recurrent state of layer 1" in shown
    assert "MambaMixer" in shown
    wrapped("minimax", eager=False).explain("mixer_states", 1)
    shown = capsys.readouterr().out
    assert "set_linear_cache" in shown
    assert "-->" in shown


@pytest.mark.parametrize("model_type", TYPES)
def test_states_of_generated_tokens(model_type):
    """After the prompt and after every token: what plain steps leave in the cache; and each invoke has its own rows."""
    model, tokens = wrapped(model_type), ids()
    module, layer = model._module, model.support()["mixer_states"][-1]
    with torch.no_grad(), model.generate(tokens, max_new_tokens=3, min_new_tokens=3, do_sample=False) as tracer:
        seen = []
        seen.save()
        for _ in tracer.iter[:3]:
            seen.append(model.mixer_states[layer].clone())
        text = tracer.result.save()
    expected = []

    def keep(_, args, kwargs, output):
        caches = [x for x in (*args, *kwargs.values()) if hasattr(x, "get_seq_length")]
        expected.append(kept(caches[0], layer).clone())

    handle = module.get_submodule(model.anatomy.blocks[layer].path).register_forward_hook(keep, with_kwargs=True)
    with torch.no_grad():
        plain = module.generate(tokens, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    handle.remove()
    assert torch.equal(text, plain)
    assert len(seen) == len(expected) == 3
    for mine, theirs in zip(seen, expected, strict=True):
        torch.testing.assert_close(mine.to(theirs), theirs)
    assert (seen[0] - seen[1]).abs().max() > 1e-5

    with torch.no_grad(), model.trace(use_cache=True) as tracer:
        with tracer.invoke(tokens[:1]):
            first = model.mixer_states[layer].clone().save()
        with tracer.invoke(tokens[1:]):
            second = model.mixer_states[layer].clone().save()
    torch.testing.assert_close(torch.cat([first, second]), seen[0], atol=1e-5, rtol=1e-4)
