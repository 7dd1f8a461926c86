"""Steering on a worker: every step of a generation, own tokens, standing steerings, conditions."""

import pytest
import torch

from nnterp import Condition
from nnterp.interventions import logit_lens
from nnterp.positions import at

pytestmark = pytest.mark.slow

PROMPTS = ["The capital of France is", "A cat"]
SETTINGS = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}


def vector_for(model):
    return 3 * torch.randn(model.hidden_size, generator=torch.Generator().manual_seed(0))


def each(pair):
    return ((pair.here, False), (pair.there, True))


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"steps": "generated"},
        {"token_positions": at("c"), "steps": "prompt"},
        {"mode": "clamp", "factor": 5.0, "keep_norm": True},
    ],
    ids=str,
)
def test_steering_in_a_generation(pair, how):
    found = []
    for model, remote in each(pair):
        vector = vector_for(model)
        with torch.no_grad(), model.generate(PROMPTS, **SETTINGS, remote=remote) as tracer:
            model.steer(1, vector, **how)
            states = [].save()

            def keep(step, model=model, states=states):
                states.append(model.layers_output[-1][:, -1])

            model.each_step(keep)
            written = tracer.result.save()
        found.append((written, torch.stack(states)))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-5, atol=1e-5)


def test_a_standing_steering_travels(pair):
    found = []
    for model, remote in each(pair):
        vector = vector_for(model)
        condition = Condition(0, vector, 0.0)
        with model.steering(vector, [1, 2]), model.steering(vector, 2, -0.5, when=condition):
            lens = logit_lens(model, PROMPTS, remote=remote)
            states = model.collect(PROMPTS, "layers_output", positions=-1, remote=remote)["layers_output"]
            with torch.no_grad(), model.generate(PROMPTS, **SETTINGS, remote=remote) as tracer:
                written = tracer.result.save()
        plain = model.collect(PROMPTS, "layers_output", positions=-1, remote=remote)["layers_output"]
        assert (states[1] - plain[1]).abs().max() > 0.1
        found.append((lens, states, written))
    for here, there in zip(*found, strict=True):
        torch.testing.assert_close(there, here, rtol=1e-5, atol=1e-5)
