"""Lenses, patching, steering and runs over prompts in a looped model, equal to plain hooks on single passes."""

import contextlib
from collections import Counter

import pytest
import torch

from nnterp import StandardizedTransformer
from nnterp.errors import Unavailable
from nnterp.interventions import (
    Component,
    ablate,
    activation_patching,
    attribution_patching,
    direct_logit_attribution,
    edge_attribution,
    fit_subspace,
    logit_lens,
    path_patching,
    steer,
)
from nnterp.prompts import Prompt, run_prompts
from nnterp.testing import tiny_tokenizer

from ..looped_modeling import looped_module
from ..plain_hooks import at_call, seen

CLEAN, CORRUPTED = [5, 9, 12, 40, 77], [33, 8, 21, 90, 14]


@pytest.fixture(scope="module")
def model():
    return StandardizedTransformer(looped_module(), tokenizer=tiny_tokenizer())


def metric(logits):
    return logits[:, 7] - logits[:, 9]


def plainly(model, ids, path=None, number=0, edit=None, given=False):
    """The metric of a run of the plain module, one call of one module edited."""
    ids = torch.tensor([ids])
    with torch.no_grad():
        if edit is None:
            return metric(model._module(ids).logits[:, -1].float())[0]
        with at_call(model._module, path, number, edit, given):
            return metric(model._module(ids).logits[:, -1].float())[0]


def plain_calls(model, ids):
    with torch.no_grad():
        return seen(model._module, lambda: model._module(torch.tensor([ids]))).calls


def runs(model):
    return [(layer, turn) for layer, times in enumerate(model.passes) for turn in range(times)]


def test_the_lens_reads_all_runs_in_order(model):
    lens = logit_lens(model, [CLEAN, CORRUPTED])
    assert lens.shape[1] == model.num_layers == 8
    some = logit_lens(model, [CLEAN], layers=model.unrolled(2))
    for i, ids in enumerate((CLEAN, CORRUPTED)):
        calls = plain_calls(model, ids)
        for layer, turn in runs(model):
            left = calls[f"model.layers.{layer}"][turn][1][:, -1]
            module = model._module
            with torch.no_grad():
                expected = module.lm_head(module.model.norm(left)).softmax(-1)[0]
            torch.testing.assert_close(lens[i, model.unrolled(layer, turn)].float(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(some[0], lens[0, model.unrolled(2)])


PATCHED = {  # value → (module in the layer, whether it is what the module is given)
    "layers_output": ("", False),
    "attentions_output": ("self_attn", False),
    "mlp_neurons": ("mlp.down_proj", True),
    "layers_input": ("", True),
    "mlp_contributions": ("mlp", False),
}


@pytest.mark.parametrize("value", PATCHED)
def test_patching_one_pass_is_that_of_a_hook(model, value):
    inner, given = PATCHED[value]
    result = activation_patching(model, clean=CLEAN, corrupted=CORRUPTED, metric=metric, values=value)
    scores = result["scores"].squeeze()
    assert list(scores.shape) == [model.num_layers, len(CLEAN)]
    calls = plain_calls(model, CLEAN)
    for layer, turn in runs(model):
        path = f"model.layers.{layer}{'.' if inner else ''}{inner}"
        kept = calls[path][turn][0 if given else 1]
        for position in (1, 4):

            def put(x, kept=kept, position=position):
                x = x.clone()
                x[:, position] = kept[:, position]
                return x

            expected = plainly(model, CORRUPTED, path, turn, put, given)
            found = scores[model.unrolled(layer, turn), position]
            assert found.item() == pytest.approx(expected.item(), rel=1e-3, abs=1e-4)


def test_ablating_one_pass_is_that_of_a_hook(model):
    found = ablate(model, [CLEAN], what=Component("mlps_output", model.unrolled(1, 1)), how="zero", metric=metric)[
        "scores"
    ].flatten()[0]
    expected = plainly(model, CLEAN, "model.layers.1.mlp", 1, lambda x: x * 0)
    assert found.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-4)
    assert abs(expected - plainly(model, CLEAN)) > 1e-3


@pytest.mark.parametrize("turn", [None, 0, 2])
def test_steering_one_pass_or_all_is_that_of_hooks(model, turn):
    vector = torch.randn(model.hidden_size, generator=torch.Generator().manual_seed(1)) * 2
    with torch.no_grad(), model.trace(torch.tensor([CLEAN])):
        steer(model, model.unrolled(2, turn), vector)
        found = metric(model.logits[:, -1]).save()
    module, calls = model._module, []

    def add(_, args, output):
        calls.append(1)
        return output + vector if turn in (None, len(calls) - 1) else output

    handle = module.model.layers[2].register_forward_hook(add)
    expected = plainly(model, CLEAN)
    handle.remove()
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-4)
    with model.steering(vector, model.unrolled(2, turn)):
        states = model.collect([CLEAN], "logits", positions=-1)["logits"]
    torch.testing.assert_close(metric(states.reshape(1, -1))[0], expected, rtol=1e-4, atol=1e-4)


def test_probabilities_over_prompts(model):
    prompts = [Prompt(CLEAN, {"a": [7], "b": [9]}), Prompt(CORRUPTED[:3], {"a": [7], "b": [9]})]
    results = run_prompts(model, prompts, get_probs_func=logit_lens, batch_size=2, tqdm=None)
    for i, ids in enumerate((CLEAN, CORRUPTED[:3])):
        calls = plain_calls(model, ids)
        for layer, turn in runs(model):
            left = calls[f"model.layers.{layer}"][turn][1][:, -1]
            with torch.no_grad():
                probs = model._module.lm_head(model._module.model.norm(left)).softmax(-1)[0]
            for name, token in (("a", 7), ("b", 9)):
                got = results[name][i, model.unrolled(layer, turn)]
                assert got.item() == pytest.approx(probs[token].item(), rel=1e-3, abs=1e-6)


def test_attribution_patching_is_the_derivative_at_every_pass(model):
    found = attribution_patching(model, clean=CLEAN, corrupted=CORRUPTED, metric=metric, values="layers_output")
    clean = plain_calls(model, CLEAN)
    kept = []

    def keep(_, args, output):
        output.retain_grad()
        kept.append(output)

    handles = [layer.register_forward_hook(keep) for layer in model._module.model.layers]
    metric(model._module(torch.tensor([CORRUPTED])).logits[:, -1]).sum().backward()
    for handle in handles:
        handle.remove()
    model._module.zero_grad()
    order = sorted(runs(model), key=lambda run: model.unrolled(*run))
    scores = found["scores"].squeeze()
    for (layer, turn), stream in zip(order, kept, strict=True):
        change = clean[f"model.layers.{layer}"][turn][1] - stream.detach()
        expected = (stream.grad * change).sum(-1)[0]
        torch.testing.assert_close(scores[model.unrolled(layer, turn)].float(), expected, rtol=1e-3, atol=1e-4)


def test_direct_logit_attribution_of_the_last_pass(model):
    """Each part times the final norm's scale times the token's row of the head, by hooks on the plain module."""
    found = direct_logit_attribution(model, [CLEAN], [(7, 9)])
    calls, module = plain_calls(model, CLEAN), model._module
    stream = calls["model.layers.3"][0][1][:, -1]
    scale = torch.rsqrt(stream.pow(2).mean(-1, keepdim=True) + module.config.rms_norm_eps)
    along = (module.lm_head.weight[7] - module.lm_head.weight[9]) * module.model.norm.weight * scale[0]
    entering = calls["model.layers.1"][2][0][:, -1]
    expected = {"entering L5": entering}
    for layer, turn in ((1, 2), (2, 2), (3, 0)):
        index = model.unrolled(layer, turn)
        for name, label in (("self_attn", "attention"), ("mlp", "mlp")):
            expected[f"L{index} {label}"] = calls[f"model.layers.{layer}.{name}"][turn][1][:, -1]
    torch.testing.assert_close(sum(expected.values()), stream, rtol=1e-4, atol=1e-4)
    assert found.labels["parts"] == (*expected, "bias")
    scores = torch.stack([(along * part[0]).sum() for part in expected.values()])
    torch.testing.assert_close(found["scores"][0, :-1], scores.detach(), rtol=1e-4, atol=1e-4)
    layers = direct_logit_attribution(model, [CLEAN], [(7, 9)], by="layer")
    assert layers.labels["parts"] == ("entering L5", "L5", "L6", "L7", "bias")
    heads = direct_logit_attribution(model, [CLEAN], [(7, 9)], by="head")
    own = [i for i, label in enumerate(heads.labels["parts"]) if label.startswith("L6.H")]
    place = found.labels["parts"].index("L6 attention")
    torch.testing.assert_close(heads["scores"][0, own].sum(), found["scores"][0, place], rtol=1e-4, atol=1e-4)


@contextlib.contextmanager
def held(module, parts, receiver=None, arrived=None):
    """Calls of modules return what is given for them; what the receiver is given is kept, or replaced by `arrived`."""
    counts, kept, handles = Counter(), [], []

    def hold(path):
        def after(_, args, output):
            counts[path] += 1
            new = parts.get((path, counts[path] - 1))
            return None if new is None else new if isinstance(output, torch.Tensor) else (new, *output[1:])

        return after

    def meet(_, args):
        counts["receiver"] += 1
        if counts["receiver"] - 1 != receiver[1]:
            return None
        kept.append(args[0].clone())
        return None if arrived is None else (arrived, *args[1:])

    for path in dict.fromkeys(path for path, _ in parts):
        handles.append(module.get_submodule(path).register_forward_hook(hold(path)))
    if receiver is not None:
        handles.append(module.get_submodule(receiver[0]).register_forward_pre_hook(meet))
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


def path_by_hooks(model, sender, receiver):
    """The metric of the path from one call of a module to what another is given (None: the logits), by hooks alone."""
    ends = [part.exit for block in model.anatomy.blocks for part in (block.mixer, block.mlp)]
    own, theirs = plain_calls(model, CORRUPTED), plain_calls(model, CLEAN)
    parts = {(path, i): made for path in dict.fromkeys(ends) for i, (_, made) in enumerate(own[path])}
    parts[sender] = theirs[sender[0]][sender[1]][1]
    with held(model._module, parts, receiver) as kept:
        score = plainly(model, CORRUPTED)
    if receiver is None:
        return score
    with held(model._module, {}, receiver, kept[0]):
        return plainly(model, CORRUPTED)


@pytest.mark.parametrize("model_type", ["of Llama's layers", "hrm_text"])
def test_paths_between_passes_are_those_of_hooks(model, tiny, model_type):
    model = model if model_type != "hrm_text" else tiny(model_type)
    blocks, last = model.anatomy.blocks, model.num_layers - 2
    assert blocks[last].turn > 0
    unpatched = plainly(model, CORRUPTED)
    for index in range(0, last, 3):
        sender = Component("attentions_output" if index % 2 else "mlps_output", index)
        part = blocks[index].mixer if index % 2 else blocks[index].mlp
        for receivers, place in (
            ("logits", None),
            (Component("mlps_input", last), (blocks[last].mlp.entry, blocks[last].turn)),
        ):
            result = path_patching(model, CLEAN, CORRUPTED, sender, receivers, metric)
            expected = path_by_hooks(model, (part.exit, blocks[index].turn), place)
            assert result["scores"].item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-4)
            assert abs(expected - unpatched) > 1e-3


@pytest.mark.parametrize("model_type", ["dory", "inkling2_loop_text"])
def test_paths_need_to_know_what_parts_add(tiny, model_type):
    with pytest.raises(Unavailable, match="no multiples of its parts add up to what the layer adds"):
        path_patching(tiny(model_type), CLEAN, CORRUPTED, Component("mlps_output", 0), "logits", metric)


def test_a_fit_through_passes_without_gradients_is_refused(tiny):
    with pytest.raises(Unavailable, match=r"under torch\.no_grad"):
        fit_subspace(tiny("hrm_text"), [CLEAN] * 2, [CORRUPTED] * 2, metric, "layers_output", 14)


@pytest.mark.parametrize(
    "call",
    [
        lambda m: direct_logit_attribution(m, [CLEAN], [7], by="position"),
        lambda m: edge_attribution(m, CLEAN, CORRUPTED, metric),
    ],
)
def test_what_adds_parts_up_over_layers_is_refused(model, call):
    with pytest.raises(Unavailable, match="runs its layers several times"):
        call(model)
