"""Ablating and patching experts of a mixture against plain hooks on what their module is given and returns."""

import pytest
import torch

from nnterp.interventions import (
    Component,
    ablate,
    activation_patching,
    attribution_patching,
    components,
    logit_difference,
)

pytestmark = pytest.mark.filterwarnings("ignore")

PROMPTS = [[11, 42, 57, 93, 130, 200], [60, 77, 101, 15], [33, 70, 91, 140, 12]]
METRIC = logit_difference(5, 9)
LAYER = 2


def score(logits):
    return (logits[-1, 5] - logits[-1, 9]).item()


def run(model, prompt, hook=None):
    handle = None if hook is None else model.mlps[LAYER]._module.experts.register_forward_pre_hook(hook)
    try:
        with torch.no_grad():
            return model._module(torch.tensor([prompt]), use_cache=False).logits[0]
    finally:
        if handle is not None:
            handle.remove()


def without(expert, positions=slice(None)):
    def hook(module, args):
        hidden, chosen, weights = args
        gone = torch.zeros_like(chosen, dtype=torch.bool)
        gone[positions] = chosen[positions] == expert
        return hidden, chosen, weights.masked_fill(gone, 0)

    return hook


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3"])
def test_every_expert_ablated_by_itself(tiny, model_type):
    model = tiny(model_type)
    every = components(model, "expert_contributions", LAYER, heads="all")
    assert len(every) == model._module.get_submodule(f"model.layers.{LAYER}.mlp.experts").num_experts
    found = ablate(model, PROMPTS, every, "zero", METRIC, batch_size=4)
    moved = 0
    for i, prompt in enumerate(PROMPTS):
        for expert in range(len(every)):
            expected = score(run(model, prompt, without(expert)))
            assert found["scores"][i, expert].item() == pytest.approx(expected, abs=2e-4)
            moved += abs(expected - found["baseline"][i].item()) > 1e-2
    assert moved >= 6
    assert found.labels["components"][3] == f"expert_contributions[{LAYER}] expert 3"


def test_one_position(tiny):
    model = tiny("mixtral")
    case = Component("expert_contributions", LAYER, heads=[0, 1, 2], positions=-1)
    found = ablate(model, PROMPTS, case, "zero", METRIC)
    for i, prompt in enumerate(PROMPTS):

        def hook(module, args):
            hidden, chosen, weights = args
            weights = weights.clone()
            weights[-1] = weights[-1].masked_fill(chosen[-1] < 3, 0)
            return hidden, chosen, weights

        assert found["scores"][i, 0].item() == pytest.approx(score(run(model, prompt, hook)), abs=2e-4)


def test_patched_from_another_prompt(tiny):
    """One expert's contribution at one position, from the clean prompt into the corrupted one."""
    model = tiny("mixtral")
    clean, corrupted = [11, 42, 57, 93, 130, 200], [11, 42, 99, 93, 130, 201]
    with torch.no_grad(), model.trace(torch.tensor([clean])):
        theirs = model.expert_contributions[LAYER][0, 2].save()
    with torch.no_grad(), model.trace(torch.tensor([corrupted])):
        own = model.expert_contributions[LAYER][0, 2].save()
    found = activation_patching(
        model, clean, corrupted, METRIC, values="expert_contributions", layers=LAYER, positions=2, heads="all"
    )
    experts, expected = model.mlps[LAYER]._module.experts, []
    for expert in range(len(own)):

        def add(module, args, output, expert=expert):
            output = output.clone()
            output[2] += theirs[expert] - own[expert]
            return output

        handle = experts.register_forward_hook(add)
        expected.append(score(run(model, corrupted)))
        handle.remove()
    assert max(expected) - min(expected) > 1e-2
    torch.testing.assert_close(found["scores"].flatten(), torch.tensor(expected), rtol=1e-3, atol=5e-4)


def test_attributed_experts_are_their_change_times_the_slope_of_the_mixture(tiny):
    model, clean, corrupted = tiny("mixtral"), [5, 9, 12, 40, 77], [33, 8, 21, 90, 14]
    found = attribution_patching(
        model, clean, corrupted, lambda logits: logits[:, 7], "expert_contributions", [2], heads="all", audit=0
    )["scores"].squeeze()
    contributions = []
    for ids in (clean, corrupted):
        with torch.no_grad(), model.trace(torch.tensor([ids])):
            contributions.append(model.expert_contributions[2].save())
    kept = []
    block = model._module.get_submodule(model.anatomy.blocks[2].mlp.exit)
    handle = block.register_forward_hook(lambda module, args, output: kept.append(output))
    score = model._module(torch.tensor([corrupted])).logits[0, -1, 7]
    handle.remove()
    (slope,) = torch.autograd.grad(score, kept)
    change = contributions[0] - contributions[1]
    torch.testing.assert_close(found, (change * slope[:, :, None]).sum((0, 1, 3)), rtol=1e-3, atol=1e-5)
