"""Steering on a worker: every step of a generation, own tokens, standing steerings, conditions."""

import functools

import pytest
import torch
from nnsight.intervention.backends.remote import RemoteError

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


def test_a_steering_that_follows_the_trace_is_refused_before_anything_is_sent(pair):
    before, steering = len(pair.worker.requests), pair.there.steering(torch.ones(pair.there.hidden_size), 1)
    with pytest.raises(ValueError, match="before the model runs"):  # noqa: SIM117
        with pair.there.trace("Paris is in", remote=True), steering:
            pair.there.logits.save()
    with pytest.raises(ValueError, match="before the model runs"):  # noqa: SIM117
        with pair.there.session(remote=True), steering:
            with pair.there.trace("Paris is in"):
                pair.there.logits.save()
    with pytest.raises(ValueError, match="before the model runs"), pair.there.session(remote=True):  # noqa: SIM117
        with pair.there.trace("Paris is in"), steering:
            pair.there.logits.save()
    assert len(pair.worker.requests) == before


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


def twice(model, vector):
    model.steer(1, vector)
    model.skip_layer(2)


class Helper:
    def __init__(self, vector):
        self.vector = vector

    def apply(self, model):
        steered = twice
        steered(model, self.vector)


@pytest.mark.parametrize("how", ["function", "object", "partial", "closure", "lambda", "list"])
def test_edits_travel_with_what_a_block_names(pair, how):
    found = []
    for model, remote in each(pair):
        vector = vector_for(model)

        def inner(model, vector=vector, edit=twice):
            edit(model, vector)

        bound = Helper(vector).apply
        edit = {
            "function": functools.partial(twice, vector=vector).func,
            "object": bound,
            "partial": functools.partial(twice, vector=vector),
            "closure": inner,
            "list": [twice],
            "lambda": lambda model: twice(model, vector),  # noqa: B023
        }[how]
        edits = edit if how == "list" else [edit]
        more = {"vector": vector} if how in ("function", "list") else {}
        with torch.no_grad(), model.trace(PROMPTS, remote=remote):
            for one in edits:
                one(model, **more)
            probs = model.next_token_probs.save()
        found.append(probs)
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)


def test_an_edit_that_did_not_travel_is_refused_in_words(pairs):
    one = pairs("llama")
    model, vector = one.there, vector_for(one.there)
    refused = pytest.raises(RemoteError, match="did not travel with the request")
    with one.worker.serving(), refused, torch.no_grad(), model.trace(PROMPTS, remote=True):
        getattr(model, "st" + "eer")(1, vector)
        _ = model.next_token_probs.save()


def test_a_block_that_edits_nothing_is_smaller(pairs):
    one = pairs("llama")
    model, vector = one.there, vector_for(one.there)
    with one.worker.serving():
        with torch.no_grad(), model.trace(PROMPTS, remote=True):
            _ = model.layers_output[2].save()
        with torch.no_grad(), model.trace(PROMPTS, remote=True):
            model.steer(1, vector)
            _ = model.layers_output[2].save()
        with torch.no_grad(), model.trace(PROMPTS, remote=True):
            _ = model.layers_output[2].save()
    plain, edited, again = (request.size for request in one.worker.requests[-3:])
    assert plain + 5_000 < edited < 40_000
    assert abs(again - plain) < 20


def test_a_session_takes_the_edits_along(pairs):
    found = []
    for model, remote in each(pairs("llama")):
        vector = vector_for(model)
        with pairs("llama").worker.serving(), torch.no_grad(), model.session(remote=remote):
            with model.trace(PROMPTS):
                state = model.layers_output[1]
            with model.trace(PROMPTS):
                model.steer(1, vector)
                probs = (model.next_token_probs + 0 * state.sum()).save()
        found.append(probs)
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)
