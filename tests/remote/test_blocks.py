"""Blocks of every kind on a worker: sessions, generation, several inputs, gradients; and what goes wrong."""

import re

import nnsight
import pytest
import torch
from nnsight.intervention.backends.remote import RemoteError

from nnterp import StandardizedTransformer
from nnterp.errors import PaddingError, RemoteModelError
from nnterp.interventions import logit_lens
from nnterp.testing import RemoteWorker, tiny_checkpoint, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.slow

PROMPT = "The capital of France is"


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def each(pair):
    return ((pair.here, False), (pair.there, True))


def test_a_session_is_one_request_and_values_flow_through_it(pair):
    before, found = len(pair.worker.requests), []
    for model, remote in each(pair):
        with torch.no_grad(), model.session(remote=remote):
            with model.trace("Paris is in"):
                state = model.layers_output[1][:, -1]
            # a comment, and a blank line, between the traces

            with model.trace(PROMPT):
                model.layers_output[1][:, -1] = state
                logits = model.logits[:, -1].save()
        found.append(logits.detach())
    assert len(pair.worker.requests) == before + 1
    close(*found)


def test_containers_made_inside_come_back(pair):
    found = []
    for model, remote in each(pair):
        with torch.no_grad(), model.session(remote=remote):
            states = nnsight.save([])
            for prompt in (PROMPT, "A cat"):
                with model.trace(prompt):
                    states.append(model.layers_output[2][:, -1])
        found.append(torch.cat([state.detach() for state in states]))
    assert found[1].shape[0] == 2
    close(*found)


def test_containers_made_outside_do_not(pair):
    model, states = pair.there, []
    with torch.no_grad(), model.trace(PROMPT, remote=True):
        states.append(model.layers_output[2][:, -1].save())
    assert states == []


def test_generation_with_an_edit_at_every_step(pair):
    found = []
    vector = torch.randn(pair.here.hidden_size, generator=torch.Generator().manual_seed(0))
    for model, remote in each(pair):
        with torch.no_grad(), model.generate(PROMPT, max_new_tokens=4, do_sample=False, remote=remote) as tracer:
            states = nnsight.save([])
            for _ in tracer.iter[:3]:
                model.steer(1, vector, factor=3.0)
                states.append(model.layers_output[-1][:, -1])
            written = tracer.result.save()
        found.append((written, torch.cat([state.detach() for state in states])))
    assert torch.equal(found[0][0], found[1][0])
    close(found[0][1], found[1][1])
    assert found[0][1].shape[0] == 3


def test_several_inputs_and_an_early_stop(pair):
    found = []
    for model, remote in each(pair):
        with torch.no_grad(), model.trace(remote=remote) as tracer:
            with tracer.invoke(PROMPT):
                one = model.layers_output[0][:, -1].save()
            with tracer.invoke("A cat"):
                model.layers_output[0][:, -1] = 0
                two = model.layers_output[1][:, -1].save()
        with torch.no_grad(), model.trace(PROMPT, remote=remote) as tracer:
            three = model.layers_output[1].save()
            tracer.stop()
        found.append([tensor.detach() for tensor in (one, two, three)])
    for actual, expected in zip(*found, strict=True):
        close(actual, expected)


def test_gradients_inside_a_block(pair):
    found = []
    for model, remote in each(pair):
        with model.trace(PROMPT, remote=remote):
            state = model.layers_output[1]
            state.requires_grad_(True)
            metric = model.logits[0, -1, 5] - model.logits[0, -1, 7]
            with metric.backward():
                gradient = state.grad.save()
        found.append(gradient.detach())
    close(*found)
    assert found[0].abs().max() > 0


def test_functions_of_ones_own_travel(pair):
    def norm_of(model, layer):
        return model.layers_output[layer].norm(dim=-1)

    found = []
    for model, remote in each(pair):
        with torch.no_grad(), model.trace(PROMPT, remote=remote):
            norms = torch.stack([norm_of(model, layer) for layer in range(model.num_layers)]).save()
        found.append(norms.detach())
    close(*found)


def test_an_error_arrives_with_the_line_it_was_made_in(pair):
    model = pair.there
    with pytest.raises(RemoteError) as caught, model.trace(PROMPT, remote=True):
        model.layers_output[1][:, 99].save()  # the line that fails
    assert "model.layers_output[1][:, 99].save()" in str(caught.value)
    assert "test_blocks.py" in str(caught.value)
    assert "IndexError" in str(caught.value)
    with torch.no_grad(), model.trace(PROMPT, remote=True):  # and the worker goes on
        after = model.layers_output[1].save()
    assert after.shape[-1] == model.hidden_size


@pytest.mark.parametrize(
    ("block", "words"),
    [
        (lambda m: m.layers_output[99], ["IndexError", "layers_output[99]", f"{4} layers"]),
        (lambda m: (m.layers_output[2], m.layers_output[0]), ["OutOfOrderError", "layers_output[0]", "forward order"]),
        (lambda m: m.steer(0, torch.zeros(7)), ["ShapeError", "steer", "[7]"]),
        (lambda m: m.router_logits[0], ["Unavailable", "router_logits"]),
    ],
)
def test_this_librarys_own_errors_arrive_in_its_words(pairs, block, words):
    one = pairs("llama")
    model = one.there
    with one.worker.serving(), pytest.raises(RemoteError) as caught, model.trace(PROMPT, remote=True):
        block(model)
    for word in words:
        assert word in str(caught.value), str(caught.value)
    raised = [line for line in str(caught.value).splitlines() if re.match(r"[\w.]+(Error|Unavailable): ", line)]
    assert raised[-1].partition(":")[0].rpartition(".")[2] == words[0]  # not an error of raising it


# -- refused before anything is sent -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        lambda m: logit_lens(m, PROMPT),
        lambda m: m.collect(PROMPT, "layers_output"),
        lambda m: m.project_on_vocab(torch.zeros(1, 64)),
        lambda m: m.dispatch(),
        lambda m: m.gradients(PROMPT, lambda logits: logits.sum(), "layers_output"),
    ],
)
def test_what_runs_here_is_refused_without_weights(pairs, call):
    one = pairs("llama")
    before = len(one.worker.requests)
    with pytest.raises(RemoteModelError, match="remote=True"):
        call(one.there)
    assert len(one.worker.requests) == before
    assert not one.there.dispatched


def test_a_trace_that_forgot_remote_is_refused(pairs):
    model = pairs("llama").there
    with pytest.raises(RemoteModelError, match="Pass remote=True"):  # noqa: SIM117
        with model.trace(PROMPT):
            model.layers_output[0].save()


def test_collecting_over_a_generation_is_refused(pairs):
    one = pairs("llama")
    with one.worker.serving(), pytest.raises(ValueError, match="does not run remotely"):
        one.there.collect(PROMPT, "layers_output", max_new_tokens=3, remote=True)


def test_right_padding_is_refused_because_the_worker_pads_left(pairs):
    one = pairs("llama")
    model = StandardizedTransformer(one.folder, remote=True, tokenizer_kwargs={"padding_side": "right"})
    with one.worker.serving(), pytest.raises(ValueError, match="pads on the left"):  # noqa: SIM117
        with model.trace([PROMPT, "A cat"], remote=True):
            model.layers_output[0].save()


def test_a_model_that_is_inexact_under_padding_refuses_it_there_as_well(tmp_path):
    folder = tiny_checkpoint("bart", tmp_path)
    model = StandardizedTransformer(folder, remote=True)
    with RemoteWorker(folder) as worker, worker.serving():
        with pytest.raises((RemoteError, PaddingError), match="different lengths"):  # noqa: SIM117
            with model.trace([PROMPT, "A cat"], remote=True):
                model.layers_output[0].save()
        both = model.collect([PROMPT, "A cat"], "layers_output", positions=-1, remote=True)["layers_output"]
        assert len(worker.requests) == 3  # refused; then one for each length
        settings = {"positions": -1, "remote": True, "to": tmp_path / "dataset"}
        on_disk = model.collect([PROMPT, "A cat"], "layers_output", **settings)["layers_output"].tensor()
    local = StandardizedTransformer(folder)
    close(both, local.collect([PROMPT, "A cat"], "layers_output", positions=-1)["layers_output"])
    close(on_disk, both)


def test_a_module_with_its_weights_can_be_sent_too(pairs):
    one = pairs("gpt2")
    model = StandardizedTransformer(tiny_model("gpt2"), tokenizer=tiny_tokenizer())
    with one.worker.serving(), torch.no_grad(), model.trace(PROMPT, remote=True):
        there = model.layers_output[2].save()
    with torch.no_grad(), model.trace(PROMPT):
        here = model.layers_output[2].save()
    close(there.detach(), here)
