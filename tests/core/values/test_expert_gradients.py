"""Gradients with respect to what experts return, against autograd through a slow loop over their parameters."""

import pytest
import torch
from nnsight.intervention.interleaver import OutOfOrderError
from torch.nn.functional import silu

from nnterp.errors import Unavailable

from .test_experts import EVERY_TOKEN, NORM_AFTER, experts_module, hooked, mixture_layer, prompts

pytestmark = pytest.mark.filterwarnings("ignore")


def metric(logits):
    return (logits[:, -1, 7] - logits[:, -1, 11]).sum() + logits[:, 3, 20].sum()


def gated(module, expert, token):
    gate, up = (module.gate_up_proj[expert] @ token).chunk(2)
    return module.down_proj[expert] @ (silu(gate) * up)


def gated_with_biases(module, expert, token):
    """GPT-OSS: gates and values in turn, both clamped."""
    both = token @ module.gate_up_proj[expert] + module.gate_up_proj_bias[expert]
    gate, up = both[::2].clamp(max=module.limit), both[1::2].clamp(-module.limit, module.limit)
    inner = (up + 1) * gate * torch.sigmoid(gate * module.alpha)
    return inner @ module.down_proj[expert] + module.down_proj_bias[expert]


def by_a_loop(one, kept):
    """A hook that makes anew what the experts' module returns, expert by expert, and keeps what autograd fills in."""

    def hook(module, args, output):
        hidden, chosen, weights = args
        tokens = hidden.reshape(-1, hidden.shape[-1])
        outputs = torch.stack(
            [torch.stack([one(module, int(e), t) for e in row]) for row, t in zip(chosen, tokens, strict=True)]
        )
        torch.testing.assert_close((outputs * weights[..., None]).sum(1).view_as(output), output, rtol=1e-4, atol=1e-4)
        for name, tensor in (("expert_outputs", outputs), ("expert_weights", weights)):
            tensor.retain_grad()
            kept[name] = tensor
        return (outputs * weights[..., None]).sum(1).view_as(output)

    return hook


def kept_grad(kept):
    """A hook that keeps what a module returns, with its gradient."""

    def hook(module, args, output):
        made = output if isinstance(output, torch.Tensor) else output[0]
        made.retain_grad()
        kept["whole"] = made

    return hook


def expected(model, layer, ids, one):
    kept = {}
    block = model._module.get_submodule(model.anatomy.blocks[layer].mlp.exit)
    with hooked(experts_module(model, layer), by_a_loop(one, kept)), hooked(block, kept_grad(kept)):
        metric(model._module(input_ids=ids, use_cache=False).logits).backward()
    model._module.zero_grad()
    return {
        name: tensor.grad.reshape(*ids.shape, *tensor.shape[1 if name != "whole" else 2 :])
        for name, tensor in kept.items()
    }


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_are_those_of_a_loop_over_the_parameters(tiny, model_type):
    model, ids = tiny(model_type), prompts()
    layer = mixture_layer(model)
    wanted = expected(model, layer, ids, gated_with_biases if model_type == "gpt_oss" else gated)
    names = ("expert_outputs", "expert_contributions", "expert_weights", "mlps_output")
    found = model.gradients(ids, metric, names, layers=layer)
    factor = model.place("expert_weights", layer).factor  # of what the experts are given, in what is shown
    torch.testing.assert_close(found["expert_outputs", layer], wanted["expert_outputs"], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found["expert_weights", layer] * factor, wanted["expert_weights"], rtol=1e-3, atol=1e-5)
    assert min(wanted[name].abs().max() for name in ("expert_outputs", "expert_weights")) > 1e-2
    # What an expert adds, chosen or not, is added to what the mixture returns.
    slopes, added = found["expert_contributions", layer], found.value(("expert_contributions", layer))
    assert slopes.shape == added.shape == (2, 11, added.shape[2], 64)
    torch.testing.assert_close(slopes, wanted["whole"][:, :, None].expand_as(slopes), rtol=1e-3, atol=1e-5)
    shapes = found.value(("expert_outputs", layer)).shape, found.value(("expert_weights", layer)).shape
    assert shapes == (wanted["expert_outputs"].shape, wanted["expert_weights"].shape)


def test_of_experts_that_all_run_on_all_tokens(tiny):
    model, ids, kept = tiny(EVERY_TOKEN), prompts(), {}
    layer = mixture_layer(model)
    with hooked(experts_module(model, layer), kept_grad(kept)):
        metric(model._module(input_ids=ids, use_cache=False).logits).backward()
    model._module.zero_grad()
    found = model.gradients(ids, metric, "expert_contributions", layers=layer)["expert_contributions", layer]
    experts = found.shape[2]
    assert found.abs().max() > 1e-2
    for expert, grad in enumerate(kept["whole"].grad.view(experts, *ids.shape, -1)):
        torch.testing.assert_close(found[:, :, expert], grad, rtol=1e-3, atol=1e-5)


def test_of_padded_prompts_and_of_gates_held_still(tiny):
    model, (long, other) = tiny("mixtral"), prompts().tolist()
    layer, short = mixture_layer(model), other[:6]

    def last(logits):
        return (logits[:, -1, 7] - logits[:, -1, 11]).sum()

    together = model.gradients([long, short], last, ("expert_outputs", "expert_weights"), layers=layer)
    alone = model.gradients([short], last, ("expert_outputs", "expert_weights"), layers=layer)
    for name in ("expert_outputs", "expert_weights"):
        torch.testing.assert_close(together[name, layer][1, -6:], alone[name, layer][0], rtol=1e-3, atol=1e-5)
    held = model.gradients([short], last, ("expert_outputs", "mlps_output"), layers=layer, frozen="gates")
    weights = alone.value(("expert_weights", layer))[..., None]
    torch.testing.assert_close(held["expert_outputs", layer], held["mlps_output", layer][:, :, None] * weights)


def test_in_a_trace_they_need_an_assignment(tiny):
    model, ids = tiny("mixtral"), prompts()
    layer = mixture_layer(model)
    refused = pytest.raises(OutOfOrderError, match=r"model\.gradients\(prompts, metric, value\) has its gradient")
    with refused, model.trace(ids):
        outputs = model.expert_outputs[layer]
        with metric(model.logits).backward():
            outputs.grad.save()
    with model.trace(ids):
        outputs = model.expert_outputs[layer]
        model.expert_outputs[layer] = outputs
        with metric(model.logits).backward():
            found = outputs.grad.save()
    expected = model.gradients(ids, metric, "expert_outputs", layers=layer)
    torch.testing.assert_close(found, expected["expert_outputs", layer], rtol=1e-3, atol=1e-5)


def test_where_there_are_none(tiny):
    norm = tiny(NORM_AFTER)
    with pytest.raises(Unavailable, match="more than a factor"):
        norm.gradients("Rome", metric, "expert_contributions", layers=mixture_layer(norm))
