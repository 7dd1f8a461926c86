"""Dictionaries attached to a model whose weights are elsewhere: they travel with the request."""

import pytest
import torch

from nnterp import Dictionary, attach, collect_features, detach
from nnterp.interventions import ablate, activation_patching, components
from nnterp.traced import Activation, JumpRelu

pytestmark = pytest.mark.slow

PROMPT, OTHER = "The capital of France is", "The capital of Japan is"


def dictionary(width, activation, seed=0):
    g = torch.Generator().manual_seed(seed)
    encoder, decoder = (torch.randn(40, width, generator=g) for _ in range(2))
    return Dictionary(encoder / width**0.5, torch.zeros(40), decoder / 3, torch.randn(width, generator=g), activation)


@pytest.fixture
def attached(pairs):
    """The same two dictionaries on the model that is here and on the one that is there."""
    one = pairs("llama")
    for model in (one.here, one.there):
        width = model.hidden_size
        attach(model, dictionary(width, JumpRelu(torch.full((40,), 0.2))), "layers_output[1]")
        attach(model, dictionary(width, Activation(), 1), "mlps_input[2]", "mlps_output[2]")
    with one.worker.serving():
        yield one
    for model in (one.here, one.there):
        detach(model)
    assert not one.there.dispatched


def metric(logits):
    return logits[:, 7] - logits[:, 9]


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_reading_and_writing_in_a_trace(attached):
    before, found = len(attached.worker.requests), []
    for model, remote in ((attached.here, False), (attached.there, True)):
        with torch.no_grad(), model.trace(PROMPT, remote=remote):
            untouched = model.logits.save()
        with torch.no_grad(), model.trace(PROMPT, remote=remote):
            first = model.features[1]
            kept = first.clone().save()
            model.features["layers_output[1]"] = first
            second = model.features[2, 0]
            model.features[2] = second * 1
            spliced = model.logits.save()
        assert torch.equal(spliced, untouched)
        with torch.no_grad(), model.trace(PROMPT, remote=remote):
            first = model.features[1]
            first[..., 3] = 5.0
            model.features[1] = first
            second = model.features[2]
            second[..., 7] = 4.0
            model.features[2] = second
            edited = model.logits.save()
        assert (edited - untouched).abs().max() > 1e-2
        found.append((kept, edited))
    for here, there in zip(*found, strict=True):
        close(there, here)
    assert all(request.bytecode == () for request in attached.worker.requests[before:])


def test_functions(attached):
    found = []
    for model, remote in ((attached.here, False), (attached.there, True)):
        whole = model.collect([PROMPT, OTHER], "features", remote=remote)
        indices, activations = collect_features(model, [PROMPT, OTHER], k=4, remote=remote)[2]
        patched = activation_patching(
            model, PROMPT, OTHER, metric, values="features", heads=[3, 7], positions=-1, remote=remote
        )
        ablated = ablate(model, PROMPT, components(model, "features", [2], [3, 7]), metric=metric, remote=remote)
        slopes = model.gradients([PROMPT], lambda x: x[0, -1, 7], "features", remote=remote)
        found.append(
            (whole["features"], indices, activations, patched["scores"], ablated["scores"], slopes["features"])
        )
    for here, there in zip(*found, strict=True):
        close(there, here)


def test_no_dictionary(pairs):
    model, worker = pairs("llama").there, pairs("llama").worker
    with worker.serving(), pytest.raises(Exception, match="attach"), model.trace(PROMPT, remote=True):
        model.features[1].save()
