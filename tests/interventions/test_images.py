"""Prompts with images: read, lensed, scored and patched, equal to plain hooks on HuggingFace's own forward."""

from __future__ import annotations

import contextlib
import dataclasses
from functools import cache

import pytest
import torch
from nnsight.intervention.interleaver import OutOfOrderError

from nnterp import StandardizedTransformer
from nnterp.interventions import activation_patching, logit_lens
from nnterp.positions import image
from nnterp.prompts import Prompt, next_token_probs, run_prompts
from nnterp.testing import tiny_image_inputs, tiny_model, tiny_tokenizer

# A plain tower; packed patches with features of several layers; an image that is attended to; attention in both
# directions over an image.
TYPES = ["llava", "qwen3_vl", "mllama", "gemma3"]


@cache
def loaded(model_type):
    return StandardizedTransformer(tiny_model(model_type, images=True), tokenizer=tiny_tokenizer())


@pytest.fixture(params=TYPES)
def model(request):
    return loaded(request.param)


def layers_of(model):
    return [model._module.get_submodule(path) for path in model.layer_paths]


def stream(output):
    return output if isinstance(output, torch.Tensor) else output[0]


@contextlib.contextmanager
def hooked(module, function):
    """`function` of what a module returns, `[1, seq, hidden]`; what it returns, unless None, replaces it."""

    def hook(_, args, output):
        new = function(stream(output))
        if new is None:
            return None
        return new if isinstance(output, torch.Tensor) else (new, *output[1:])

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def plain_run(model, prompt, edits=()):
    """The logits `[seq, vocab]` of one prompt, and what leaves each layer, `[layers, seq, hidden]`."""
    kept = {}
    with contextlib.ExitStack() as stack:
        for layer, function in edits:
            stack.enter_context(hooked(layers_of(model)[layer], function))
        for i, module in enumerate(layers_of(model)):
            stack.enter_context(hooked(module, lambda x, i=i: kept.__setitem__(i, x[0].clone())))
        logits = model._module(**prompt).logits[0]
    return logits.float(), torch.stack([kept[i] for i in range(len(kept))])


def image_tokens(model, prompt):
    config = model._module.config
    token = getattr(config, "image_token_id", None)
    return (prompt["input_ids"][0] == token).nonzero()[:, 0].tolist()


def test_collect(model):
    prompts = [tiny_image_inputs(model._module, seed=0), tiny_image_inputs(model._module, seed=1, ids=(9, 33, 12))]
    collected = model.collect(prompts, ["layers_output", "logits"])
    for i, prompt in enumerate(prompts):
        logits, states = plain_run(model, prompt)
        seq = len(logits)
        torch.testing.assert_close(collected["layers_output"][:, i, :seq], states)
        torch.testing.assert_close(collected["logits"][i, :seq].float(), logits)
    assert collected.layers["layers_output"] == tuple(range(model.num_layers))


def test_collect_at_the_image(model):
    prompt = tiny_image_inputs(model._module)
    own = image_tokens(model, prompt)
    found = model.collect(prompt, "layers_output", positions=image())
    assert found.positions == (tuple(own),)
    torch.testing.assert_close(found["layers_output"][:, 0], plain_run(model, prompt)[1][:, own])
    assert torch.equal(
        model.collect(prompt, "layers_output", positions=image(-1))["layers_output"], found["layers_output"]
    )


def test_lens_over_image_tokens(model):
    prompt = tiny_image_inputs(model._module)
    own = image_tokens(model, prompt)
    probs = logit_lens(model, prompt, positions=image())
    logits, states = plain_run(model, prompt)
    assert probs.shape[:3] == (1, model.num_layers, len(own))
    torch.testing.assert_close(probs[0, -1], logits[own].softmax(-1))
    final, head = (model._module.get_submodule(getattr(model.anatomy, role)) for role in ("ln_final", "lm_head"))
    with torch.no_grad():
        expected = head(final(states[1, own])).float().softmax(-1)
    torch.testing.assert_close(probs[0, 1], expected)


def test_run_prompts(model):
    prompts = [tiny_image_inputs(model._module, seed=seed) for seed in range(3)]
    expected = torch.stack([plain_run(model, prompt)[0][-1].softmax(-1) for prompt in prompts])
    torch.testing.assert_close(next_token_probs(model, prompts), expected)
    asked = [Prompt(prompt, {"a": [7, 9], "b": [300]}) for prompt in prompts]
    results = run_prompts(model, asked, tqdm=None, batch_size=2)
    torch.testing.assert_close(results["a"].float(), expected[:, [7, 9]].sum(-1))
    over_depth = run_prompts(model, asked, get_probs_func=logit_lens, tqdm=None)
    torch.testing.assert_close(over_depth["b"][:, -1].float(), expected[:, 300])
    with pytest.raises(ValueError, match="first_token"):
        run_prompts(model, [Prompt(prompts[0], {"a": [7]}, {"a": " x"})], scoring="sequence", tqdm=None)


@pytest.mark.parametrize("copies", [True, False])
def test_patching_between_two_images(model, copies, monkeypatch):
    clean, corrupted = tiny_image_inputs(model._module, seed=0), tiny_image_inputs(model._module, seed=1)
    model.validate_images(clean)
    if not copies:
        vision = dataclasses.replace(model.facts.vision, copies=False)
        monkeypatch.setattr(model, "facts", dataclasses.replace(model.facts, vision=vision))
    at = [*image_tokens(model, clean)[:2], -1]
    result = activation_patching(model, clean, corrupted, lambda logits: logits[:, 7] - logits[:, 9], positions=at)
    _, states = plain_run(model, clean)

    def difference(logits):
        return logits[-1, 7] - logits[-1, 9]

    assert not torch.allclose(result["clean"], result["corrupted"])
    torch.testing.assert_close(result["clean"][0], difference(plain_run(model, clean)[0]))
    torch.testing.assert_close(result["corrupted"][0], difference(plain_run(model, corrupted)[0]))
    for layer in range(model.num_layers):
        for k, position in enumerate(at):

            def patch(x, position=position, layer=layer):
                x = x.clone()
                x[0, position] = states[layer, position]
                return x

            expected = difference(plain_run(model, corrupted, [(layer, patch)])[0])
            torch.testing.assert_close(result["scores"][0, layer, k], expected, rtol=1e-4, atol=1e-4)


def test_steering_at_the_image(model):
    prompt, vector = tiny_image_inputs(model._module), torch.randn(64, generator=torch.Generator().manual_seed(3))
    own = image_tokens(model, prompt)
    with torch.no_grad(), model.trace(prompt):
        model.steer(1, vector, factor=2.0, token_positions=image())
        logits = model.logits.save()

    def add(x):
        x = x.clone()
        x[0, own] += 2 * vector
        return x

    torch.testing.assert_close(logits[0].float(), plain_run(model, prompt, [(1, add)])[0])


def test_prompts_with_other_images_are_other_prompts(model):
    from nnterp.inputs import encode

    first, same, other = encode(model, [tiny_image_inputs(model._module, seed=seed) for seed in (0, 0, 1)], images=True)
    assert first.ids == other.ids
    assert first.identity == same.identity != other.identity
    assert first == same != other


def test_a_checkpoint_of_other_images_is_refused(model, tmp_path):
    first, other = ([Prompt(tiny_image_inputs(model._module, seed=seed), {"a": [7]})] for seed in (0, 5))
    run_prompts(model, first, tqdm=None, checkpoint=tmp_path)
    with pytest.raises(ValueError, match="prompt"):
        run_prompts(model, other, tqdm=None, checkpoint=tmp_path)


def test_functions_that_run_texts_refuse_images(model):
    prompt = tiny_image_inputs(model._module)
    with pytest.raises(TypeError, match="has an image, and this function runs texts"):
        model.gradients(prompt, lambda logits: logits.sum(), "layers_output")
    with pytest.raises(TypeError, match="has an image"):
        model.collect(prompt, "layers_output", max_new_tokens=2)
    with pytest.raises(ValueError, match="no image"):
        model.collect([prompt["input_ids"][0].tolist()], "layers_output")
    with pytest.raises(ValueError, match="cannot be taken apart"):
        model.collect({k: torch.cat([v, v]) for k, v in prompt.items()}, "layers_output")
    with pytest.raises(ValueError, match="no image tokens"):
        model.collect("The cat", "layers_output", layers=0, positions=image())
    with pytest.raises(ValueError, match="needs the model's processor"):
        model.collect([("What is this?", object())], "layers_output")


def test_mllama_attends_to_the_image():
    """The layers that a text leaves out run with an image, and need one in every prompt."""
    model = loaded("mllama")
    prompt = tiny_image_inputs(model._module)
    with model.trace(prompt):
        crossed = model.layers_output[1].save()
        skipped = model.layers_output[3].save()
    _, states = plain_run(model, prompt)
    torch.testing.assert_close(crossed[0], states[1])
    torch.testing.assert_close(skipped[0], states[3])
    with pytest.raises(ValueError, match="texts apart"):
        logit_lens(model, [prompt, "The cat"])
    with pytest.raises(OutOfOrderError), model.trace("The cat"):
        model.layers_output[1].save()
