"""A `SteeringVector` in a block that runs on a worker without this library."""

import pytest
import torch

from nnterp.interventions import SteeringVector

pytestmark = pytest.mark.slow
PROMPT = "The capital of France is"


def test_a_vector_steers_on_the_worker(pair):
    generator = torch.Generator().manual_seed(0)
    width = pair.here.hidden_size
    vector = SteeringVector({layer: torch.randn(width, generator=generator) for layer in (0, 2)})
    before, found = len(pair.worker.requests), []
    for model, remote in ((pair.there, True), (pair.here, False)):
        with torch.no_grad(), model.steering(vector, factor=2), model.trace(PROMPT, remote=remote):
            around = model.logits.save()
        with torch.no_grad(), model.trace(PROMPT, remote=remote):
            model.steer([0], vector, 2)
            model.steer(2, vector.directions, 2)
            inside = model.logits.save()
        found.append((around, inside))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-5, atol=1e-5)
    requests = pair.worker.requests[before:]
    assert {name for request in requests for name in request.bytecode} == set()
    assert max(request.size for request in requests) < 60_000
