"""Inside linear attention and state spaces: what the recurrence is given, against hooks and a slow recurrence."""

import sys

import pytest
import torch

from nnterp.anatomy import find_anatomy
from nnterp.errors import Unavailable
from nnterp.testing import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore")

RULES = ["qwen3_next", "kimi_linear"]
SCANS = ["mamba", "mamba2"]
OTHERS = {
    "delta": ["bailing_hybrid", "olmo_hybrid", "qwen3_5", "qwen3_5_moe", "qwen4_exp"],
    "scan": ["bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba", "nemotron_h", "zamba2"],
}
UNSERVED = ["minimax", "rwkv", "zamba", "recurrent_gemma", "lfm2"]
PROMPT = torch.stack([torch.arange(8, 19), torch.arange(40, 29, -1)])


def first_layer(model):
    return model.support()["mixer_keys"][0]


def read(model, layer, names):
    with torch.no_grad(), model.trace(PROMPT):
        found = [getattr(model, name)[layer].clone() for name in names]
        found.save()
        mixed = model.mixers_output[layer].save()
    return found, mixed


def given_to(model_type, layer, wanted):
    """What a function in the mixer's own file is called with and returns, in a model that nnsight never saw."""
    module = tiny_model(model_type)
    mixers = find_anatomy(module, None).blocks
    home = sys.modules[type(module.get_submodule(mixers[layer].mixer.path)).__module__]
    seen = []

    def spied(function):
        def spy(*args, **kwargs):
            made = function(*args, **kwargs)
            seen.append((args, kwargs, made[0] if isinstance(made, tuple) else made))
            return made

        return spy

    kept = {name: getattr(home, name) for name in dir(home) if wanted in name and callable(getattr(home, name))}
    for name, function in kept.items():
        setattr(home, name, spied(function))
    try:
        with torch.no_grad():
            module(input_ids=PROMPT, use_cache=False)
    finally:
        for name, function in kept.items():
            setattr(home, name, function)
    return seen[0]


def slow_delta_rule(q, k, v, g, beta):
    """One token and one head at a time: decay, correct what the key reads, read with the query."""
    made = torch.zeros(*v.shape)
    for row in range(v.shape[0]):
        for head in range(v.shape[2]):
            shared = head // (v.shape[2] // k.shape[2])
            state = torch.zeros(k.shape[-1], v.shape[-1])
            for t in range(v.shape[1]):
                key, query = k[row, t, shared], q[row, t, shared]
                key, query = key / (key @ key + 1e-6).sqrt(), query / (query @ query + 1e-6).sqrt()
                state = g[row, t, head].exp().reshape(-1, 1) * state
                state = state + torch.outer(key, beta[row, t, head] * (v[row, t, head] - key @ state))
                made[row, t, head] = query @ state / k.shape[-1] ** 0.5
    return made


def check_delta_rule(model, model_type):
    layer = first_layer(model)
    names = ("mixer_queries", "mixer_keys", "mixer_values", "mixer_decays", "mixer_betas")
    found, _ = read(model, layer, names)
    args, kwargs, made = given_to(model_type, layer, "delta")
    theirs = [*args, kwargs["g"], kwargs["beta"]]
    for mine, its in zip(found, theirs, strict=True):
        torch.testing.assert_close(mine, its)
    torch.testing.assert_close(slow_delta_rule(*found), made, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("model_type", RULES)
def test_gated_delta_rules(tiny, model_type):
    check_delta_rule(tiny(model_type), model_type)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", OTHERS["delta"])
def test_more_gated_delta_rules(tiny, model_type):
    check_delta_rule(tiny(model_type), model_type)


def slow_scan(c, b, x, dt, a, d):
    """Of Mamba, one channel at a time: `[batch, seq, channels]`."""
    made = torch.zeros(*x.shape)
    for row in range(x.shape[0]):
        for channel in range(x.shape[2]):
            state = torch.zeros(b.shape[-1])
            for t in range(x.shape[1]):
                step = dt[row, t, channel]
                state = (a[channel] * step).exp() * state + step * b[row, t] * x[row, t, channel]
                made[row, t, channel] = c[row, t] @ state + d[channel] * x[row, t, channel]
    return made


def check_scan(model, model_type):
    layer = first_layer(model)
    (c, b, x, dt), _ = read(model, layer, ("mixer_queries", "mixer_keys", "mixer_values", "mixer_steps"))
    args, kwargs, made = given_to(model_type, layer, "scan")
    given = dict(zip(("x", "dt", "A", "B", "C"), args, strict=False)) | kwargs
    turned = given["x"].dim() == 3
    for mine, its in ((x, given["x"]), (dt, given["dt"]), (b, given["B"]), (c, given["C"])):
        torch.testing.assert_close(mine, its.transpose(1, 2) if turned else its)
    bias = given.get("dt_bias") if turned is False else given.get("delta_bias")
    step = torch.nn.functional.softplus(dt + (0 if bias is None else bias))
    a, d = given["A"], given["D"]
    if not turned:  # heads of Mamba 2 are channels that share a decay, and keys and queries in groups
        heads, width = x.shape[2:]
        parts = []
        for head in range(heads):
            group = head // (heads // b.shape[2])
            alike = [t[head].expand(width) for t in (a, d)]
            each = step[:, :, head : head + 1].expand(-1, -1, width)
            parts.append(slow_scan(c[:, :, group], b[:, :, group], x[:, :, head], each, alike[0][:, None], alike[1]))
        expected = torch.stack(parts, 2)
    else:
        expected = slow_scan(c, b, x, step, a, d)
        gate = given.get("z")
        expected = expected if gate is None else expected * torch.nn.functional.silu(gate.transpose(1, 2))
    torch.testing.assert_close(expected, made.transpose(1, 2) if turned else made, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("model_type", SCANS)
def test_selective_scans(tiny, model_type):
    check_scan(tiny(model_type), model_type)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", OTHERS["scan"])
def test_more_selective_scans(tiny, model_type):
    check_scan(tiny(model_type), model_type)


@pytest.mark.parametrize(("model_type", "name"), [("qwen3_next", "mixer_values"), ("mamba", "mixer_values")])
def test_written_values_of_one_token_change_it_and_what_follows(tiny, model_type, name):
    """Zero values at one token are what a slow rule gives without them: earlier positions stay, later ones move."""
    model = tiny(model_type)
    layer = first_layer(model)
    _, before = read(model, layer, ())
    with torch.no_grad(), model.trace(PROMPT):
        values = getattr(model, name)[layer].clone()
        values[1, 4] = 0
        getattr(model, name)[layer] = values
        after = model.mixers_output[layer].save()
    assert torch.equal(after[0], before[0])
    torch.testing.assert_close(after[1, :4], before[1, :4])
    assert all((after[1, t] - before[1, t]).abs().max() > 1e-4 for t in range(4, 7))


def test_collected_at_each_prompts_own_positions(tiny):
    model = tiny("qwen3_next")
    layer, texts = first_layer(model), ["The capital of France is", "Rome is"]
    collected = model.collect(texts, ["mixer_keys", "mixer_betas"], layers=layer, positions=-1, batch_size=1)
    for i, text in enumerate(texts):
        with torch.no_grad(), model.trace(text):
            keys = model.mixer_keys[layer].save()
            betas = model.mixer_betas[layer].save()
        torch.testing.assert_close(collected["mixer_keys", layer][i], keys[0, -1])
        torch.testing.assert_close(collected["mixer_betas", layer][i], betas[0, -1])


@pytest.mark.parametrize("model_type", UNSERVED)
def test_what_is_refused(tiny, model_type):
    model = tiny(model_type)
    layer = next(b.index for b in model.anatomy.blocks if b.kind != "attention")
    with pytest.raises(Unavailable, match="no operation of its mixer is a gated delta rule or a selective scan"):
        model.place("mixer_keys", layer)


def test_layers_of_softmax_attention_have_none(tiny):
    with pytest.raises(Unavailable, match="its mixer is softmax attention"):
        tiny("llama").place("mixer_keys", 0)
    with pytest.raises(Unavailable, match="given none"):
        tiny("mamba").place("mixer_betas", 0)
