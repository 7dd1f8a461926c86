"""The lenses of 1.x, called as its users call them: `nn_model=`, plain renamed nnsight models, surplus latents."""

from __future__ import annotations

import warnings

import pytest
import torch
from nnsight import TransformersModel

from nnterp import StandardizedTransformer, get_rename_dict
from nnterp.interventions import (
    TargetPrompt,
    logit_lens,
    patch_object_attn_lens,
    patchscope_generate,
    patchscope_lens,
    probe,
)
from nnterp.nnsight_utils import compute_next_token_probs, get_token_activations
from nnterp.prompts import next_token_probs_unsqueeze
from nnterp.testing import tiny_model, tiny_tokenizer

PROMPTS = ["The cat sat", "A dog ran far"]
TARGET = TargetPrompt("The answer is", -1)


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def pair(request):
    """A `StandardizedTransformer`, and plain renamed nnsight, each over a module with the same weights."""
    plain = TransformersModel(
        tiny_model(request.param), task="text-generation", tokenizer=tiny_tokenizer(), rename=get_rename_dict()
    )
    return StandardizedTransformer(tiny_model(request.param), tokenizer=tiny_tokenizer()), plain


def test_the_logit_lens_of_a_plain_model(pair):
    model, plain = pair
    found = logit_lens(nn_model=plain, prompts=PROMPTS)
    torch.testing.assert_close(found, logit_lens(model, PROMPTS))
    with torch.no_grad():
        for i, prompt in enumerate(PROMPTS):
            logits = plain._module(**plain.tokenizer(prompt, return_tensors="pt")).logits[0, -1]
            torch.testing.assert_close(found[i, -1], logits.softmax(-1))


@pytest.mark.parametrize(
    "call",
    [
        lambda m: patchscope_lens(m, PROMPTS, TARGET),
        lambda m: patch_object_attn_lens(m, PROMPTS[:1], PROMPTS, 0, num_patches=1),
        lambda m: patchscope_generate(m, PROMPTS[:1], TARGET, max_new_tokens=3, layers=[0, 1])[1].float(),
    ],
    ids=["patchscope_lens", "patch_object_attn_lens", "patchscope_generate"],
)
def test_functions_on_a_plain_model(pair, call):
    model, plain = pair
    torch.testing.assert_close(call(plain), call(model))


def test_the_first_argument_is_called_nn_model(pair):
    model, _ = pair
    torch.testing.assert_close(
        patchscope_lens(nn_model=model, source_prompts=PROMPTS, target_patch_prompts=TARGET),
        patchscope_lens(model, PROMPTS, TARGET),
    )


def probed(model, **prompts):
    return probe(model, labels=[0, 1] * 2, layers=1, folds=2, controls=(), **prompts)["accuracy"]


def generated(model, **asked):
    return patchscope_generate(model, target_patch_prompt=TARGET, layers=1, do_sample=False, **asked)[1]


def object_lens(model, **targets):
    return patch_object_attn_lens(model, PROMPTS[:1], attn_idx_patch=0, num_patches=1, **targets)


@pytest.mark.parametrize(
    ("call", "name", "now", "was"),
    [
        (object_lens, "patch_object_attn_lens", "target_patch_prompts", "target_prompts"),
        (compute_next_token_probs, "compute_next_token_probs", "prompts", "prompt"),
        (next_token_probs_unsqueeze, "next_token_probs_unsqueeze", "prompts", "prompt"),
        (probed, "probe", "prompts", "texts"),
        (generated, "patchscope_generate", "source_prompts", "prompts"),
        (generated, "patchscope_generate", "max_new_tokens", "max_length"),
        (generated, "patchscope_generate", "batch_size", "max_batch_size"),
    ],
)
def test_an_argument_that_was_renamed_works_with_a_warning(pair, call, name, now, was):
    model, _ = pair
    given = PROMPTS * 2 if call is probed else PROMPTS if now.endswith("prompts") else 2
    rest = {"source_prompts": PROMPTS} if call is generated and given == 2 else {}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".* goes away in", category=DeprecationWarning)
        expected = call(model, **{now: given}, **rest)
    with pytest.warns(DeprecationWarning, match="goes away in") as told:
        found = call(model, **{was: given}, **rest)
    torch.testing.assert_close(found, expected)
    (said,) = [w for w in told if "goes away in" in str(w.message)]
    assert str(said.message) == f"`{name}({was}=)` is deprecated and goes away in 3.0: use `{now}=`."
    assert said.filename == __file__
    with pytest.raises(TypeError, match=f"{name}.. was given {now}= and {was}=, its old name"):
        call(model, **{now: given, was: given}, **rest)


def test_a_plain_model_with_edits_is_refused(pair):
    _, plain = pair
    with plain.edit(inplace=True):
        plain.layers[0].output = plain.layers[0].output * 0
    try:
        with pytest.raises(ValueError, match="edits"):
            logit_lens(plain, PROMPTS)
    finally:
        plain.clear_edits()


def test_more_latents_than_layers(pair):
    model, _ = pair
    latents = get_token_activations(model, PROMPTS)
    whole = patchscope_lens(model, latents=latents, target_patch_prompts=TARGET)
    torch.testing.assert_close(patchscope_lens(model, None, TARGET, [0, 1], latents), whole[:, :2])
    with pytest.warns(UserWarning, match="the first is written to layer 2"):
        later = patchscope_lens(model, None, TARGET, [2], latents)
    torch.testing.assert_close(later, patchscope_lens(model, None, TARGET, [2], latents[:1]))
