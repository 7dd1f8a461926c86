"""The two small trained models of tools/real_models.py: the same numbers as HuggingFace, and facts that they know."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from nnterp.interventions import logit_lens

pytestmark = [pytest.mark.real, pytest.mark.slow]

PARIS = "The Eiffel Tower is in the city of"
KNOWN = {"smollm2": 0.656, "gemma3": 0.497}  # the probability of " Paris"


@pytest.fixture(params=KNOWN)
def name(request):
    return request.param


def test_it_is_certified_and_knows_where_the_tower_is(real, name):
    model = real(name)
    assert model.certificate.ok
    with torch.no_grad(), model.trace(PARIS):
        probs = model.next_token_probs.save()
    token = model.tokenizer(" Paris", add_special_tokens=False).input_ids[0]
    assert probs[0].argmax() == token
    assert float(probs[0, token]) == pytest.approx(KNOWN[name], abs=2e-3)


def test_padded_rows_and_the_last_layers_lens_are_huggingfaces(real, name):
    model = real(name)
    prompts = [PARIS, "Once upon a time", "2 + 2 ="]
    plain = AutoModelForCausalLM.from_pretrained(model.repo_id, dtype=torch.float32)
    alone = []
    for prompt in prompts:
        with torch.no_grad():
            alone.append(plain(**model.tokenizer(prompt, return_tensors="pt")).logits[0, -1])
    with torch.no_grad(), model.trace(prompts):
        logits = model.logits[:, -1].save()
    torch.testing.assert_close(logits, torch.stack(alone), rtol=1e-3, atol=2e-3)
    torch.testing.assert_close(logit_lens(model, prompts)[:, -1], torch.stack(alone).softmax(-1), rtol=1e-2, atol=1e-4)


def test_steering_every_step_equals_hooks(real, name):
    model = real(name)
    layer = model.num_layers // 2
    vector = 20 * torch.randn(model.hidden_size, generator=torch.Generator().manual_seed(0))
    settings = {"max_new_tokens": 12, "do_sample": False}
    block = model._module.get_submodule(model.layer_paths[layer])
    encoding = model.tokenizer([PARIS, "The weather"], return_tensors="pt", padding=True)

    def add(_, __, output):
        return output + vector if isinstance(output, torch.Tensor) else (output[0] + vector, *output[1:])

    handle = block.register_forward_hook(add)
    with torch.no_grad():
        expected = model._module.generate(**encoding, **settings)
    handle.remove()
    with torch.no_grad():
        plain = model._module.generate(**encoding, **settings)
        with model.generate([PARIS, "The weather"], **settings) as tracer:
            model.steer(layer, vector)
            steered = tracer.result.save()
    assert torch.equal(steered, expected)
    assert steered.shape != plain.shape or not torch.equal(steered, plain)
