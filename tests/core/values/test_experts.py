"""Experts of a mixture: what each returns for each token, against plain hooks and a slow loop over the parameters."""

from contextlib import contextmanager

import pytest
import torch

from nnterp.errors import ShapeError, Unavailable
from nnterp.testing import model_types

from ..test_certificate_zoo import REFUSED

pytestmark = pytest.mark.filterwarnings("ignore")

# One type for each way of building a mixture, and those with a factor after the experts, with experts that return what
# they are given, and with experts that all run on all tokens.
KINDS = ["mixtral", "deepseek_v3", "gpt_oss"]
ODD = ["beam", "longcat_flash", "dbrx"]
EVERY_TOKEN = "llama4_text"
NORM_AFTER = "axk1"
NO_MODULE = {"jetmoe": "no module of it is given the chosen experts"}


def prompts():
    return torch.stack([torch.arange(8, 19), torch.arange(40, 29, -1)])


def mixture_layer(model):
    return next(b.index for b in reversed(model.anatomy.blocks) if b.mixture_of_experts)


def experts_module(model, layer):
    return model._module.get_submodule(model.place("expert_contributions", layer).path)


@contextmanager
def hooked(module, hook, pre=False):
    register = module.register_forward_pre_hook if pre else module.register_forward_hook
    handle = register(hook)
    try:
        yield
    finally:
        handle.remove()


def plain(model, ids):
    with torch.no_grad():
        return model._module(input_ids=ids, use_cache=False).logits


def without_expert(expert):
    """A hook on what the experts' module is given, in which one expert has no weight."""

    def hook(module, args):
        hidden, chosen, weights = args
        return hidden, chosen, weights.masked_fill(chosen == expert, 0)

    return hook


def check_sum(model, layer, ids):
    """The block's output is what it is without its experts, and what they contribute; returns all that was read."""
    sparse = model.support().available("expert_outputs", layer)
    with torch.no_grad(), model.trace(ids):
        if sparse:
            chosen = model.router_choices[layer].save()
            weights = model.expert_weights[layer].save()
            outputs = model.expert_outputs[layer].save()
        contributions = model.expert_contributions[layer].save()
        whole = model.mlps_output[layer].save()
    without = []
    block = model._module.get_submodule(model.anatomy.blocks[layer].mlp.exit)
    with (
        hooked(experts_module(model, layer), lambda m, a, output: torch.zeros_like(output)),
        hooked(block, lambda m, a, output: without.append(output if isinstance(output, torch.Tensor) else output[0])),
    ):
        plain(model, ids)
    total = contributions.sum(2)
    assert total.abs().max() > 0.05 * whole.abs().max()
    error = (without[0].reshape(whole.shape) + total - whole).abs().max() / whole.abs().max()
    assert error < 1e-5
    if not sparse:
        return None, None, None, contributions
    assert outputs.shape == (*chosen.shape, whole.shape[-1])
    torch.testing.assert_close((weights[..., None] * outputs).sum(2), total, rtol=1e-4, atol=1e-5)
    placed = torch.zeros_like(contributions).scatter_add(
        2, chosen[..., None].expand_as(outputs), weights[..., None] * outputs
    )
    torch.testing.assert_close(placed, contributions, rtol=1e-4, atol=1e-5)
    return chosen, weights, outputs, contributions


def check_ablation(model, layer, ids, expert):
    """Writing zero for one expert gives the logits of a plain hook that takes its weight away."""
    with torch.no_grad(), model.trace(ids):
        edited = model.expert_contributions[layer].clone()
        edited[:, :, expert] = 0
        model.expert_contributions[layer] = edited
        logits = model.logits.save()
    with hooked(experts_module(model, layer), without_expert(expert), pre=True):
        expected = plain(model, ids)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert (expected - plain(model, ids)).abs().max() > 1e-3


@pytest.mark.parametrize("model_type", KINDS)
def test_contributions_add_up_and_can_be_ablated(tiny, model_type):
    model, ids = tiny(model_type), prompts()
    layer = mixture_layer(model)
    chosen, *_ = check_sum(model, layer, ids)
    check_ablation(model, layer, ids, int(chosen.flatten().mode().values))


@pytest.mark.parametrize("model_type", ODD)
def test_odd_mixtures(tiny, model_type):
    test_contributions_add_up_and_can_be_ablated(tiny, model_type)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [t for t in model_types() if t not in (*KINDS, *ODD, *REFUSED)])
def test_every_mixture_of_the_zoo(tiny, model_type):
    model = tiny(model_type)
    layers = [b.index for b in model.anatomy.blocks if b.mixture_of_experts]
    support = model.support()
    if not layers:
        assert support["expert_contributions"] == ()
        return
    if model_type in NO_MODULE:
        assert all(NO_MODULE[model_type] in why for why in support.reasons["expert_outputs"].values())
        return
    assert list(support["expert_contributions"]) == ([] if model_type == NORM_AFTER else layers)
    if model_type == NORM_AFTER:
        assert list(support["expert_outputs"]) == list(support["expert_weights"]) == layers
        return
    chosen, *_ = check_sum(model, layers[-1], prompts())
    if chosen is not None:
        check_ablation(model, layers[-1], prompts(), int(chosen.flatten().mode().values))


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3"])
def test_outputs_are_those_of_a_loop_over_the_parameters(tiny, model_type):
    model, ids = tiny(model_type), prompts()
    layer = mixture_layer(model)
    module, given = experts_module(model, layer), []
    with hooked(module, lambda m, args: given.append(args[0]), pre=True):
        plain(model, ids)
    with torch.no_grad(), model.trace(ids):
        chosen = model.router_choices[layer].save()
        outputs = model.expert_outputs[layer].save()
    tokens = given[0].view(*ids.shape, -1)
    for row in range(ids.shape[0]):
        for position in (0, 4, 10):
            for slot, expert in enumerate(chosen[row, position].tolist()):
                gate, up = (module.gate_up_proj[expert] @ tokens[row, position]).chunk(2)
                expected = module.down_proj[expert] @ (torch.nn.functional.silu(gate) * up)
                torch.testing.assert_close(outputs[row, position, slot], expected, rtol=1e-4, atol=1e-5)


def test_experts_that_all_run_on_all_tokens(tiny):
    model, ids = tiny(EVERY_TOKEN), prompts()
    layer = mixture_layer(model)
    *_, contributions = check_sum(model, layer, ids)
    experts = contributions.shape[2]

    def without_third(module, args, output):
        output = output.clone()
        output.unflatten(0, (experts, -1))[3] = 0
        return output

    with torch.no_grad(), model.trace(ids):
        edited = model.expert_contributions[layer].clone()
        edited[:, :, 3] = 0
        model.expert_contributions[layer] = edited
        logits = model.logits.save()
    with hooked(experts_module(model, layer), without_third):
        expected = plain(model, ids)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert contributions[:, :, 3].abs().max() > 0
    for name in ("expert_outputs", "expert_weights"):
        with pytest.raises(Unavailable, match="every expert runs on every token"):
            model.place(name, layer)


def test_written_outputs_weights_and_choices(tiny):
    """Of one token, against hooks on what the experts' module is given and returns."""
    model, ids = tiny("mixtral"), prompts()
    layer, token = mixture_layer(model), ids.shape[1] + 4  # the fifth token of the second row
    module, swapped = experts_module(model, layer), torch.zeros(64)
    swapped[::3] = 2.0

    def run(change):
        with torch.no_grad(), model.trace(ids):
            change(model)
            logits = model.logits.save()
        return logits

    def put_output(m):
        outputs = m.expert_outputs[layer].clone()
        outputs[1, 4, 0] = swapped
        m.expert_outputs[layer] = outputs

    def put_weight(m):
        weights = m.expert_weights[layer].clone()
        weights[1, 4, 1] = 3.0
        m.expert_weights[layer] = weights

    def put_choice(m):
        chosen = m.router_choices[layer].clone()
        chosen[1, 4] = torch.tensor([5, 0])
        m.router_choices[layer] = chosen

    def given_output(m, args, output):
        hidden, chosen, weights = args
        alone = module.forward(hidden[token : token + 1], chosen[token : token + 1, :1], torch.ones(1, 1))
        output = output.clone()
        output[token] += weights[token, 0] * (swapped - alone[0])
        return output

    def given_weight(m, args):
        hidden, chosen, weights = args
        weights = weights.clone()
        weights[token, 1] = 3.0
        return hidden, chosen, weights

    def given_choice(m, args):
        hidden, chosen, weights = args
        chosen = chosen.clone()
        chosen[token] = torch.tensor([5, 0])
        return hidden, chosen, weights

    before = plain(model, ids)
    for change, hook, pre in (
        (put_output, given_output, False),
        (put_weight, given_weight, True),
        (put_choice, given_choice, True),
    ):
        with hooked(module, hook, pre):
            expected = plain(model, ids)
        written = run(change)
        torch.testing.assert_close(written, expected, rtol=1e-4, atol=1e-4)
        assert (written[1] - before[1]).abs().max() > 1e-2
        torch.testing.assert_close(written[0], before[0], rtol=1e-4, atol=1e-4)


def test_every_invoke_sees_and_writes_its_own_rows(tiny):
    model, (first, second) = tiny("mixtral"), prompts().split(1)
    layer = mixture_layer(model)
    alone = []
    for ids in (first, second):
        with torch.no_grad(), model.trace(ids):
            alone.append((model.expert_weights[layer].save(), model.expert_outputs[layer].save()))
    with torch.no_grad(), model.trace(second):
        model.expert_contributions[layer] = model.expert_contributions[layer] * 0
        expected = model.logits.save()
    with torch.no_grad(), model.trace() as tracer:
        with tracer.invoke(first):
            weights, outputs = model.expert_weights[layer].save(), model.expert_outputs[layer].save()
            kept = model.logits.save()
        with tracer.invoke(second):
            others = model.expert_weights[layer].save()
            model.expert_contributions[layer] = model.expert_contributions[layer] * 0
            silenced = model.logits.save()
    torch.testing.assert_close(weights, alone[0][0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs, alone[0][1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(others, alone[1][0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(silenced, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(kept, plain(model, first), rtol=1e-4, atol=1e-4)


def test_in_a_generation_each_step_has_one_token(tiny):
    model, ids = tiny("mixtral"), prompts()
    layer = mixture_layer(model)
    with torch.no_grad(), model.generate(ids, max_new_tokens=3, min_new_tokens=3, pad_token_id=0) as tracer:
        shapes = [].save()
        for _ in tracer.iter[:]:
            shapes.append(tuple(model.expert_outputs[layer].shape[:3]))
    assert shapes == [(2, 11, 2), (2, 1, 2), (2, 1, 2)]


def test_collected_are_those_of_each_prompt_alone(tiny):
    model = tiny("mixtral")
    layer, texts = mixture_layer(model), ["The capital of France is", "Rome is"]
    names = ("router_choices", "expert_weights", "expert_outputs", "expert_contributions")
    collected = model.collect(texts, names, layers=layer, positions=-1)
    for i, text in enumerate(texts):
        for name in names:
            with torch.no_grad(), model.trace(text):
                alone = getattr(model, name)[layer].save()
            torch.testing.assert_close(collected[name, layer][i], alone[0, -1], rtol=1e-4, atol=1e-5)


def test_what_is_refused(tiny):
    model, ids = tiny("mixtral"), prompts()
    layer = mixture_layer(model)
    with torch.no_grad(), pytest.raises(ShapeError, match="cannot replace"), model.trace(ids):
        model.expert_outputs[layer] = torch.zeros(2, 11, 3, 64)
    with pytest.raises(ValueError, match="whole numbers"):
        model.gradients("Rome", lambda logits: logits.sum(), "router_choices", layers=layer)
    with pytest.raises(Unavailable, match="no mixture of experts"):
        tiny("llama").place("expert_outputs", 1)
    norm = tiny(NORM_AFTER)
    with pytest.raises(Unavailable, match="more than a factor"):
        norm.place("expert_contributions", mixture_layer(norm))


def test_explained(tiny, capsys):
    model = tiny("mixtral")
    model.explain("expert_outputs", mixture_layer(model))
    assert "run apart on the tokens sent to it" in capsys.readouterr().out
