"""The lenses of 1.x, called as its users call them: `nn_model=`, plain renamed nnsight models, surplus latents."""

from __future__ import annotations

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
)
from nnterp.nnsight_utils import get_token_activations
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
        lambda m: patchscope_generate(m, PROMPTS[:1], TARGET, max_length=3, layers=[0, 1])[1].float(),
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
