"""The caller's default dtype and device change nothing, and are the caller's again afterwards."""

from __future__ import annotations

import pytest
import torch

from nnterp import nnsight_utils
from nnterp.interventions import (
    Component,
    Result,
    TargetPrompt,
    TargetPromptBatch,
    ablate,
    activation_patching,
    kl_divergence,
    logit_difference,
    logit_lens,
    logit_lens_table,
    patch_object_attn_lens,
    patchscope_generate,
    patchscope_lens,
    patchscope_table,
    path_patching,
    repeat_prompt,
)
from nnterp.prompts import Prompt, next_token_probs, run_prompts

from .callers import default_device, default_dtype

FRANCE, ITALY, LONG = "The capital of France is", "The capital of Italy is", "The Eiffel Tower is in the city of"
BOTH = [FRANCE, LONG]
PARIS = logit_difference(" Paris", " Rome")
HEAD, MLP = Component("attention_head_outputs", 1, 0), Component("mlps_output", 3)


SETTINGS = {
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "with meta": lambda: torch.device("meta"),
    "set to meta": lambda: default_device("meta"),
}


def numbers(made):
    if isinstance(made, torch.Tensor):
        return [made]
    if isinstance(made, Result):
        return list(made.tensors.values())
    if isinstance(made, dict):
        return list(made.values())
    return [part for item in made for part in numbers(item)]


def probabilities_with_a_constant(logits):
    """A metric that makes tensors without naming their dtype or device."""
    return (logits.softmax(-1)[:, :3] * torch.tensor([1.0, 2.0, 3.0])).sum(-1) + torch.ones(len(logits))


CALLS = {
    "collect": lambda m: [m.collect(BOTH, "layers_output", [0, 3])["layers_output"]],
    "collect, patterns": lambda m: [m.collect(BOTH, "mlp_neurons", [1], positions=-1)["mlp_neurons"]],
    "collect, reduced": lambda m: [m.collect(BOTH, "layers_output", reduce="mean")["layers_output"]],
    "collect, function": lambda m: [m.collect(BOTH, "layers_output", reduce=lambda x: x.mean(1))["layers_output"]],
    "collect, mask": lambda m: [m.collect(BOTH, "layers_output", [0]).mask],
    "collect over a generation": lambda m: (lambda c: [c["layers_output"], c.generated, c.mask])(
        m.collect(BOTH, "layers_output", [1], max_new_tokens=3, do_sample=False)
    ),
    "gradients": lambda m: (lambda g: [g["layers_output"], g.metric, g.logits, g.value("layers_output")])(
        m.gradients(BOTH, lambda logits: logits[:, -1, 3].sum() * torch.tensor(0.5), "layers_output", [0, 2])
    ),
    "logit_lens": lambda m: logit_lens(m, BOTH, layers=[3, 1]),
    "logit_lens, targets": lambda m: logit_lens(m, BOTH, targets=[[" Paris"], [" Paris"]]),
    "logit_lens_table": lambda m: logit_lens_table(m, BOTH, targets=[[" Paris"], [" Rome"]]),
    "patchscope_lens": lambda m: patchscope_lens(m, BOTH),
    "patchscope_table": lambda m: patchscope_table(m, BOTH, TargetPromptBatch.auto(repeat_prompt(), 2), [2, 5]),
    "patchscope_generate": lambda m: patchscope_generate(m, FRANCE, TargetPrompt("a a\n?", -1), 3, [1, 5]),
    "patch_object_attn_lens": lambda m: patch_object_attn_lens(m, FRANCE, ITALY, -1),
    "activation_patching": lambda m: activation_patching(m, FRANCE, ITALY, PARIS, layers=[1, 5]),
    "activation_patching, heads": lambda m: activation_patching(
        m, FRANCE, ITALY, probabilities_with_a_constant, "attention_head_outputs", layers=[1], heads="all"
    ),
    "path_patching": lambda m: path_patching(m, FRANCE, ITALY, [HEAD, MLP], "logits", kl_divergence()),
    "ablate, zero": lambda m: ablate(m, BOTH, [HEAD, MLP]),
    "ablate, mean": lambda m: ablate(m, BOTH, [HEAD, MLP], "mean"),
    "ablate, resample": lambda m: ablate(m, FRANCE, MLP, "resample", reference=[LONG, ITALY + " now"], seed=3),
    "run_prompts": lambda m: run_prompts(
        m, [Prompt.from_strings(p, {"a": "Paris", "b": "Rome"}, m) for p in BOTH], progress=False
    ),
    "run_prompts, sequence": lambda m: run_prompts(
        m, [Prompt.from_strings(p, {"a": "Paris now", "b": "Rome"}, m) for p in BOTH], scoring="sequence", tqdm=None
    ),
    "run_prompts, lens": lambda m: run_prompts(
        m, [Prompt.from_strings(p, {"a": "Paris"}, m) for p in BOTH], get_probs_func=logit_lens, tqdm=None
    ),
    "Prompt.run": lambda m: Prompt.from_strings(FRANCE, {"a": "Paris"}, m).run(m, next_token_probs),
    "next_token_probs": lambda m: next_token_probs(m, BOTH),
    "next_token_probs, targets": lambda m: next_token_probs(m, BOTH, targets=[[[5, 6]], [[7]]]),
    "get_token_activations": lambda m: nnsight_utils.get_token_activations(m, BOTH),
    "batched": lambda m: nnsight_utils.collect_token_activations_batched(m, BOTH, 1),
    "compute_next_token_probs": lambda m: nnsight_utils.compute_next_token_probs(m, BOTH),
}


@pytest.fixture(scope="module")
def plain():
    """What each call makes under the process's own defaults, computed once."""
    return {}


ONCE_MORE = ("float64", "set to meta")  # another default dtype, and the same default device by another call


@pytest.mark.parametrize("setting", [pytest.param(s, marks=[pytest.mark.slow] * (s in ONCE_MORE)) for s in SETTINGS])
@pytest.mark.parametrize("name", CALLS)
def test_defaults_of_the_caller_change_nothing(toy, plain, name, setting):
    if name not in plain:
        plain[name] = numbers(CALLS[name](toy))
    toy.proofs.clear()  # what is proven on the way is proven under the caller's defaults, too
    with SETTINGS[setting]():
        found = numbers(CALLS[name](toy))
    for a, b in zip(plain[name], found, strict=True):
        assert a.dtype == b.dtype
        assert a.device == b.device
        assert torch.equal(a.nan_to_num(nan=-7.0), b.nan_to_num(nan=-7.0))


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_model_is_proven_under_any_defaults(tiny, setting):
    model = tiny("llama")
    plain = [(line.name, line.status) for line in model.validate().lines]
    with SETTINGS[setting]():
        assert [(line.name, line.status) for line in model.validate().lines] == plain


def test_defaults_come_back_after_an_error(toy):
    with default_dtype(torch.bfloat16), torch.device("meta"):
        with pytest.raises(IndexError):
            logit_lens(toy, FRANCE, layers=99)
        assert torch.get_default_dtype() == torch.bfloat16
        assert torch.get_default_device() == torch.device("meta")
