"""Every function that takes `remote=`, on a worker without this library, equal to the same call here."""

import pytest
import torch

from nnterp import nnsight_utils
from nnterp.interventions import (
    Component,
    Lens,
    ablate,
    activation_patching,
    head_scores,
    kl_divergence,
    logit_difference,
    logit_lens,
    patch_object_attn_lens,
    patch_subspace,
    patchscope_generate,
    patchscope_lens,
    path_patching,
    probe,
    repeat_prompt,
    steering_sweep,
    steering_vectors,
    value_weighted_attention,
)
from nnterp.interventions._fitted._belonging import Origin
from nnterp.prompts import Prompt, next_token_probs, run_prompts

pytestmark = pytest.mark.slow

PROMPTS = ["The capital of France is", "A cat", "Hello there my friend, how are"]


def tensors(result):
    """Every tensor of a result, in order."""
    if isinstance(result, torch.Tensor):
        return [result]
    if hasattr(result, "tensors"):
        return tensors(result.tensors)
    if hasattr(result, "items"):
        return [t for _, value in result.items() for t in tensors(value)]
    if isinstance(result, (list, tuple)):
        return [t for value in result for t in tensors(value)]
    return []


def questions(model):
    return [
        Prompt.from_strings(text, {"first": ["Paris", "dog"], "second": "house"}, model.tokenizer) for text in PROMPTS
    ]


CLEAN = ["The capital of France is", "A cat and a dog were"]
CORRUPTED = ["The capital of Japan is", "A cow and a pig were"]


def last_logit(logits):
    return logits[:, 7]


def metric(logits):
    """A logit difference, the mean over prompts."""
    return (logits[:, -1, 7] - logits[:, -1, 11]).mean()


def gradients_of(model, remote):
    found = model.gradients(PROMPTS, metric, ["layers_output", "attention_head_outputs"], remote=remote)
    layers = {"layers_output": range(model.num_layers), "attention_head_outputs": model.attention_layers}
    slopes = [found[name, layer] for name, own in layers.items() for layer in own]
    return [found.metric, found.logits, *slopes, found.value(("layers_output", 1))]


def a_lens(model):
    weight = torch.eye(model.hidden_size) + torch.linspace(-0.1, 0.1, model.hidden_size)
    return Lens("tuned", {0: weight}, {0: torch.ones(model.hidden_size)}, Origin(None, None, model.num_layers))


def directions(width):
    """Two of them, `[width, 2]`."""
    return torch.randn(width, 2, generator=torch.Generator().manual_seed(0))


CALLS = {
    "logit_lens": lambda m, r: logit_lens(m, PROMPTS, remote=r),
    "logit_lens, inverse": lambda m, r: logit_lens(m, PROMPTS, remote=r, return_inv_logits=True),
    "logit_lens, reduced": lambda m, r: logit_lens(
        m, PROMPTS, remote=r, top_k=3, entropy=True, against_last=True, positions=[-1, -2], layers=[2, 0]
    ),
    "patchscope_lens": lambda m, r: patchscope_lens(m, PROMPTS, repeat_prompt(), layers=[1, 2], remote=r),
    "patchscope_generate": lambda m, r: patchscope_generate(
        m, PROMPTS[:2], repeat_prompt(), max_new_tokens=3, layers=[1, 2], remote=r, do_sample=False
    ),
    "collect, last token": lambda m, r: m.collect(
        PROMPTS,
        ["mlp_neurons" if m.model_class != "JambaForCausalLM" else "mlps_output", "layers_output", "layers_mid"],
        positions=-1,
        remote=r,
    ),
    "collect, attention": lambda m, r: m.collect(
        PROMPTS,
        ["attention_head_outputs", "attention_contributions", "attention_head_contributions", "attention_keys"],
        positions=[-1, 0],
        remote=r,
    ),
    "collect, probabilities": lambda m, r: m.collect(PROMPTS, "attention_probabilities", remote=r),
    "collect, everywhere": lambda m, r: m.collect(PROMPTS, "layers_output", batch_size=2, remote=r, progress=False),
    "collect, mean": lambda m, r: m.collect(PROMPTS, "layers_output", reduce="mean", remote=r),
    "collect, function": lambda m, r: m.collect(PROMPTS, "layers_output", reduce=lambda t: t.norm(dim=-1), remote=r),
    "gradients": lambda m, r: gradients_of(m, r),
    "activation_patching, stream": lambda m, r: activation_patching(
        m, CLEAN, CORRUPTED, logit_difference([7, 8], [11, 12]), positions=[-1, 2], remote=r, progress=False
    ),
    "activation_patching, heads": lambda m, r: activation_patching(
        m,
        CLEAN[0],
        CORRUPTED[0],
        kl_divergence(),
        "attention_head_outputs",
        m.attention_layers[:1],
        heads="all",
        remote=r,
    ),
    "activation_patching, contributions": lambda m, r: activation_patching(
        m, CLEAN[0], CORRUPTED[0], last_logit, ["mixer_contributions", "mlp_contributions"], [1], [-1], remote=r
    ),
    "ablate, mean": lambda m, r: ablate(
        m, CLEAN, [Component("mlps_output", 1), Component("mixers_output", 2)], "mean", reference=PROMPTS, remote=r
    ),
    "ablate, zero": lambda m, r: ablate(
        m, CLEAN, Component("attention_head_outputs", m.attention_layers[0], heads=(1,)), remote=r
    ),
    "path_patching": lambda m, r: path_patching(
        m,
        CLEAN[0],
        CORRUPTED[0],
        Component("attention_head_outputs", m.attention_layers[0], heads=(1,)),
        Component("mlps_input", m.num_layers - 1),
        last_logit,
        remote=r,
    ),
    "head_scores, induction": lambda m, r: head_scores(m, "induction", n=3, length=5, draws=2, remote=r),
    "head_scores, name_mover": lambda m, r: head_scores(
        m, "name_mover", [[11, 42, 57, 93, 42], [60, 77, 99, 15, 60]], [42, 60], draws=2, remote=r
    ),
    "value_weighted_attention": lambda m, r: value_weighted_attention(m, PROMPTS, remote=r),
    "patch_subspace": lambda m, r: patch_subspace(
        m, CLEAN, CORRUPTED, last_logit, "layers_output", 1, directions(m.hidden_size), [-1, 2], controls=2, remote=r
    ),
    "patch_subspace, head": lambda m, r: patch_subspace(
        m,
        CLEAN,
        CORRUPTED,
        logit_difference([7, 8], [11, 12]),
        "attention_head_outputs",
        m.attention_layers[0],
        directions(m.head_dim),
        head=1,
        direction="noising",
        controls=1,
        remote=r,
    ),
    "patch_object_attn_lens": lambda m, r: (
        patch_object_attn_lens(m, PROMPTS[0], PROMPTS[:2], -1, num_patches=2, remote=r)
        if len(m.attention_layers) == m.num_layers
        else logit_lens(m, PROMPTS[0], remote=r)  # a hybrid has layers without attention
    ),
    "steering_vectors": lambda m, r: [
        direction
        for positions in (-1, None)
        for direction in steering_vectors(m, PROMPTS, CLEAN, positions=positions, remote=r).directions.values()
    ],
    "probe": lambda m, r: probe(m, [*PROMPTS, *CLEAN], [1, 1, 0, 0, 1], layers=[1], folds=2, repeats=1, remote=r),
    "steering_sweep": lambda m, r: steering_sweep(
        m,
        torch.linspace(-1, 1, m.hidden_size),
        PROMPTS,
        logit_difference(7, 11),
        layers=[0, 2],
        factors=[1, -2],
        damage={"kl": ["A cat"], "perplexity": CLEAN, "repetition": None},
        max_new_tokens=3,
        remote=r,
    ),
    "logit_lens, fitted": lambda m, r: logit_lens(m, PROMPTS, lens=a_lens(m), layers=[0, -1], remote=r),
    "next_token_probs": lambda m, r: next_token_probs(m, PROMPTS, remote=r),
    "run_prompts": lambda m, r: run_prompts(m, questions(m), batch_size=2, remote=r).log_probs,
    "run_prompts, lens": lambda m, r: (
        run_prompts(m, questions(m), batch_size=2, remote=r, get_probs_func=logit_lens).log_probs
    ),
    "run_prompts, sequence": lambda m, r: (
        run_prompts(m, questions(m), batch_size=2, remote=r, scoring="sequence").log_probs
    ),
    "get_token_activations": lambda m, r: nnsight_utils.get_token_activations(m, PROMPTS, remote=r),
    "get_token_activations, attention": lambda m, r: nnsight_utils.get_token_activations(
        m, PROMPTS, m.attention_layers, nnsight_utils.get_attention_output, remote=r
    ),
    "collect_token_activations_batched": lambda m, r: nnsight_utils.collect_token_activations_batched(
        m, PROMPTS, 3, remote=r, use_session=False
    ),
    "collect_last_token_activations_session": lambda m, r: nnsight_utils.collect_last_token_activations_session(
        m, PROMPTS, 2, remote=r
    ),
    "compute_next_token_probs": lambda m, r: nnsight_utils.compute_next_token_probs(m, PROMPTS, remote=r),
}


@pytest.mark.parametrize("call", CALLS)
def test_equal_to_the_same_call_here(pair, call):
    before = len(pair.worker.requests)
    actual, expected = tensors(CALLS[call](pair.there, True)), tensors(CALLS[call](pair.here, False))
    requests = pair.worker.requests[before:]
    assert requests, "nothing was sent"
    assert expected
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert a.device.type == "cpu"
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5, equal_nan=True)
    print(f"{call}: {len(requests)} requests of at most {max(r.size for r in requests)} bytes")
    assert max(r.size for r in requests) < 60_000
    assert {name for r in requests for name in r.bytecode} == set()
