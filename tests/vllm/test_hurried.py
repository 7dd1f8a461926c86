"""What is asked wrongly gives a clear error and never a wrong number; the engine answers the next plain request."""

import pytest
import torch
from nnsight.intervention.interleaver import OutOfOrderError

from nnterp.errors import InsideTraceError, Unavailable
from nnterp.vllm import logit_lens

from .reference import NEW, PROMPTS, STEERED
from .test_collect import left_in
from .test_values import close

GIVEN = [list(ids) for ids in PROMPTS]
LONG = [5 + i % 200 for i in range(128)]  # with a new token, one more than the engine takes


@pytest.fixture(autouse=True)
def answers(model, reference, on_the_toy):
    """The engine is as before after each test."""
    yield
    assert left_in(model) == (0, 0)
    assert not model._installed_edits
    close(model.collect(GIVEN, "logits", positions=-1)["logits"], torch.stack([x[-1] for x in reference["logits"]]))


def a_trace(model):
    with model.trace(GIVEN[0]):  # noqa: SIM117
        with model.trace(GIVEN[1]):
            model.logits.save()


def an_edit(model):
    with model.trace(GIVEN[0]):  # noqa: SIM117
        with model.edit():
            model.logits.save()


def a_collection(model):
    with model.trace(GIVEN[0]):
        model.collect(GIVEN, "logits")


def a_steering(model):
    with model.trace(GIVEN[0]):  # noqa: SIM117
        with model.steering(torch.ones(model.hidden_size), 1):
            model.logits.save()


def a_proof(model):
    with model.trace(GIVEN[0]):
        model.validate()


@pytest.mark.parametrize("work", [a_trace, an_edit, a_collection, a_steering, a_proof])
def test_what_runs_the_model_is_refused_inside_a_trace(model, work):
    with pytest.raises(InsideTraceError, match="trace"):
        work(model)


def test_what_follows_the_trace_in_its_with_is_refused(model, reference):
    """It would be over before the model runs."""
    with pytest.raises(ValueError, match="before the model runs"):  # noqa: SIM117
        with model.trace(GIVEN[0]), model.steering(reference["vector"], list(STEERED)):
            model.logits.save()
    with pytest.raises(ValueError, match="before the model runs"), model.trace() as tracer:  # noqa: SIM117
        with tracer.invoke(GIVEN[0]), model.steering(reference["vector"], list(STEERED)):
            model.logits.save()
    with pytest.raises(ValueError, match="before the model runs"):  # noqa: SIM117
        with model.session(), model.steering(reference["vector"], list(STEERED)):
            with model.trace(GIVEN[0]):
                model.logits.save()
    with pytest.raises(ValueError, match="before the model runs"):  # noqa: SIM117
        with model.edit(), model.steering(reference["vector"], list(STEERED)):
            model.logits.save()
    with pytest.raises(ValueError, match="before the model runs"):  # noqa: SIM117
        with model.generate(GIVEN[0], max_new_tokens=2), model.steering(reference["vector"], list(STEERED)):
            model.logits.save()


@pytest.mark.parametrize("run", ["run", "generate", "collect", "lens", "trace"])
def test_a_steering_that_fails_in_one_request_raises(model, reference, run):
    """Else its output would be that of an unsteered run."""
    runs = {
        "run": lambda: model.run(GIVEN, 2),
        "generate": lambda: model.generate(GIVEN, max_new_tokens=2),
        "collect": lambda: model.collect(GIVEN, "logits"),
        "lens": lambda: logit_lens(model, GIVEN),
    }
    positions = {"token_positions": 4}  # the second prompt has three tokens
    with model.steering(reference["vector"], list(STEERED), **positions), pytest.raises(IndexError, match="position 4"):
        if run == "trace":
            with model.trace(GIVEN[1]):
                model.logits.save()
        else:
            runs[run]()


def test_an_edit_that_fails_raises_from_a_run(model):
    with model.edit() as (_, edit):
        model.layers_output[99].save()
    try:
        with pytest.raises(IndexError, match="layers_output"):
            model.run(GIVEN)
    finally:
        edit.clear()


def test_a_prompt_that_the_engine_does_not_take_is_named(model, tmp_path):
    given = [GIVEN[0], LONG, GIVEN[1]]
    for work in (
        lambda: model.run(given, 2),
        lambda: model.generate(given, max_new_tokens=2),
        lambda: model.collect(given, "logits"),
        lambda: model.collect(given, "logits", max_new_tokens=2),
        lambda: logit_lens(model, given),
        lambda: model.collect(given, "logits", to=tmp_path / "list"),
        lambda: model.collect((ids for ids in given), "logits", to=tmp_path / "generator", prompts_per_shard=1),
    ):
        with pytest.raises(ValueError, match="Prompt 1 has 128 tokens; the engine takes at most 127"):
            work()
    with pytest.raises(ValueError, match="at most 127"), model.trace(LONG):
        model.logits.save()
    assert model.collect([LONG[:-1]], "logits", positions=-1)["logits"].isfinite().all()


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ("", "no tokens"),
        ([], "No prompts"),
        (None, "not NoneType"),
        ([5.0, 7.0], "integer"),
        ([5, 10**6], "token id 1000000"),
        ([5, -3], "token id -3"),
        ([{"role": "user", "content": "hi"}], "chat template"),
        ([[5, 7], [8, 9]], "exactly one prompt"),
        (["The", "A"], "exactly one prompt"),
    ],
)
def test_no_prompts_are_refused_in_a_trace_and_in_a_run(model, given, match):
    with pytest.raises((ValueError, TypeError), match=match), model.trace(given):
        model.logits.save()
    with pytest.raises((ValueError, TypeError), match=match), model.trace() as tracer:
        with tracer.invoke(GIVEN[0]):
            model.logits.save()
        with tracer.invoke(given):
            model.logits.save()
    if match != "exactly one prompt":
        with pytest.raises((ValueError, TypeError), match=match):
            model.run(given)


def test_prompts_of_every_kind_in_a_trace(model, reference):
    ids = GIVEN[0]
    masked = {"input_ids": torch.tensor([[0, *ids]]), "attention_mask": torch.tensor([[0] + [1] * len(ids)])}
    for given in (torch.tensor(ids), torch.tensor([ids]), torch.tensor(ids).numpy(), masked, {"prompt_token_ids": ids}):
        with model.trace(given):
            logits = model.logits.save()
        close(logits[0], reference["logits"][0])


def test_settings_that_are_wrong(model):
    for work, match in (
        (lambda: model.run(GIVEN, max_tokens=3), "max_new_tokens"),
        (lambda: model.collect(GIVEN, "logits", max_new_tokens=2, max_tokens=3), "max_new_tokens"),
        (lambda: model.run(GIVEN, 0), "at least 1"),
        (lambda: model.run(GIVEN, "3"), "integer"),
        (lambda: model.run(GIVEN, max_tokns=3), "max_tokns"),
        (lambda: model.trace(GIVEN[0], remote=True), "this machine"),
        (lambda: model(GIVEN), "model.run"),
        (lambda: logit_lens(model, GIVEN[:1], [[[-1]]]), "token id -1"),
        (lambda: logit_lens(model, GIVEN[:1], [[[10**6]]]), "token id 1000000"),
    ):
        with pytest.raises((TypeError, ValueError, Unavailable), match=match):
            work()


def test_generating_without_a_block_is_greedy_too(model, reference):
    outputs = model.generate(GIVEN, max_new_tokens=NEW, ignore_eos=True)
    assert [list(output.outputs[0].token_ids) for output in outputs] == reference["greedy"]
    [output] = model.generate({"prompt_token_ids": GIVEN[0]}, max_new_tokens=NEW, ignore_eos=True)
    assert list(output.outputs[0].token_ids) == reference["greedy"][0]


def test_what_cannot_leave_the_engine_says_what_can(model):
    with pytest.raises(TypeError, match="Save tensors"), model.trace(GIVEN[0]):
        every = model.layers_output.save()  # noqa: F841


def test_errors_in_a_block_of_several_requests(model):
    class OwnError(Exception):
        pass

    with pytest.raises(ZeroDivisionError), model.trace() as tracer:
        with tracer.invoke(GIVEN[0]):
            model.logits.save()
        with tracer.invoke(GIVEN[1]):
            model.layers_output[1] * (1 / 0)
    with pytest.raises(RuntimeError, match="OwnError: mine"), model.trace(GIVEN[0]):
        raise OwnError("mine")
    with pytest.raises(ValueError, match="third"), model.trace(GIVEN[0], max_new_tokens=5, ignore_eos=True) as tracer:
        for step in tracer.iter[:5]:
            if step == 2:
                raise ValueError("third")
            model.logits.save()
    with pytest.raises(OutOfOrderError, match="layers_output"), model.trace() as tracer:
        with tracer.invoke(GIVEN[0]):
            model.logits.save()
        with tracer.invoke(GIVEN[1]):
            late = model.layers_output[2]
            late + model.layers_output[1]


def test_steered_and_plain_requests_in_one_pass(model, reference):
    vector, scale = reference["vector"], reference["scale"]
    with model.trace() as tracer:
        with tracer.invoke(GIVEN[0]):
            before = model.logits.save()
        with tracer.invoke(GIVEN[0]):
            model.steer(list(reversed(STEERED)), vector, scale)
            steered = model.logits.save()
        with tracer.invoke(GIVEN[0]):
            after = model.logits.save()
    close(before[0], reference["logits"][0])
    close(steered[0], reference["steered"][0])
    close(after[0], reference["logits"][0])
