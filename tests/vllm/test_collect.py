"""What `collect` reduces, and what becomes of a run in vLLM that is cut short: nothing stays in the engine."""

import contextlib
import signal
from unittest import mock

import pytest
import torch

from nnterp.collection import Collected
from nnterp.vllm._requests import CleanEngine

from .reference import NEW, PROMPTS, STEERED
from .test_values import close

GIVEN = [list(ids) for ids in PROMPTS]
MANY = [[*ids, 20 + i] for i in range(34) for ids in GIVEN]  # more than the engine runs at once
LAYER = 2


def every(reference, value):
    """A value of one layer at all positions of all prompts, `[positions, ...]`."""
    return torch.cat([read[value, LAYER][0] for read in reference["read"]])


def width(given):
    return given.norm(dim=-1)


def largest(given):
    return given.topk(2, dim=-1).values.amax(1)


def flat(given):
    return given.flatten(0, 1)


def interrupted(given):
    import signal

    signal.raise_signal(signal.SIGINT)
    return given


def tokens(model):
    return [list(output.outputs[0].token_ids) for output in model.run(GIVEN, NEW, ignore_eos=True)]


def left_in(model):
    """Requests in the engine, and workers of nnsight's that wait for some."""
    engine = model.vllm_entrypoint.llm_engine
    return engine.get_num_unfinished_requests(), *engine.collective_rpc("nnsight_request_count")


@contextlib.contextmanager
def cut_short(passes):
    """A block in which the engine is interrupted after some passes."""
    step, left = CleanEngine.step, iter(range(passes))

    def counted(self):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return step(self)

    with mock.patch.object(CleanEngine, "step", counted), pytest.raises(KeyboardInterrupt) as caught:
        yield caught


@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_sums_over_prompts_and_positions(model, reference, reduce):
    made = model.collect(GIVEN, ["layers_output", "next_token_probs"], reduce=reduce)
    expected = getattr(every(reference, "layers_output").double(), reduce)(0)
    close(made["layers_output", LAYER], expected)
    probs = torch.stack([logits[-1].softmax(-1) for logits in reference["logits"]])
    close(made["next_token_probs"], getattr(probs.double(), reduce)(0))
    last = model.collect(GIVEN, "layers_output", positions=-1, reduce=reduce)
    ends = torch.stack([read["layers_output", LAYER][0, -1] for read in reference["read"]])
    close(last["layers_output", LAYER], getattr(ends.double(), reduce)(0))


def test_a_function_is_given_the_positions_of_one_prompt(model, reference):
    made = model.collect(GIVEN, "layers_output", reduce=width)["layers_output", LAYER]
    most = model.collect(GIVEN, "layers_output", reduce=largest)["layers_output", LAYER]
    assert made.shape == (3, max(map(len, GIVEN)))
    for i, read in enumerate(reference["read"]):
        own = read["layers_output", LAYER]
        close(made[i, : own.shape[1]], own[0].norm(dim=-1))
        assert not made[i, own.shape[1] :].any()
        close(most[i], own[0].topk(2, dim=-1).values.amax(0))
    with pytest.raises(ValueError, match="keep the first axis"):
        model.collect(GIVEN, "layers_output", reduce=flat)
    with pytest.raises(ValueError, match="reduce is"):
        model.collect(GIVEN, "layers_output", reduce="median")


def test_reducing_what_a_generation_passes(model):
    whole = model.collect(GIVEN, "layers_output", max_new_tokens=NEW, ignore_eos=True)
    mean = model.collect(GIVEN, "layers_output", max_new_tokens=NEW, ignore_eos=True, reduce="mean")
    norms = model.collect(GIVEN, "layers_output", max_new_tokens=NEW, ignore_eos=True, reduce=width)
    close(mean["layers_output"], whole["layers_output"].double().mean((1, 2)))
    close(norms["layers_output"], whole["layers_output"].norm(dim=-1))
    assert mean.generated.tolist() == whole.generated.tolist()


def test_positions_of_their_own_for_the_same_prompt_twice(model, reference):
    made = model.collect([GIVEN[0], GIVEN[1], GIVEN[0]], "layers_output", positions=[[0, 1], [2], [3]])
    own = [read["layers_output", LAYER][0] for read in reference["read"]]
    close(made["layers_output", LAYER][0], own[0][[0, 1]])
    close(made["layers_output", LAYER][1, 0], own[1][2])
    close(made["layers_output", LAYER][2, 0], own[0][3])


@pytest.mark.parametrize(
    "options", [{}, {"reduce": "mean"}, {"reduce": width}, {"max_new_tokens": 3, "ignore_eos": True}]
)
def test_a_call_goes_on_from_what_was_cut_short(model, on_the_toy, reference, tmp_path, options):
    whole = model.collect(MANY, "layers_output", **options)
    with cut_short(options.get("max_new_tokens", 1) + 1) as caught:
        model.collect(MANY, "layers_output", **options)
    partial = caught.value.partial
    assert 0 < len(partial.done) < len(MANY)
    assert left_in(model) == (0, 0)
    assert not model._installed_edits
    assert tokens(model) == reference["greedy"]
    partial.save(tmp_path / "partial")
    resumed = model.collect(MANY, "layers_output", resume=tmp_path / "partial.safetensors", **options)
    close(resumed["layers_output"], whole["layers_output"])
    assert resumed.done == set(range(len(MANY)))
    if "max_new_tokens" in options:
        assert resumed.generated.tolist() == whole.generated.tolist()
    with model.steering(reference["vector"], list(STEERED)), pytest.raises(ValueError, match="edits"):
        model.collect(MANY, "layers_output", resume=partial, **options)
    with pytest.raises(ValueError, match="no partial result"):
        model.collect(MANY, "layers_output", resume=resumed, **options)
    assert Collected.load(tmp_path / "partial.safetensors").done == partial.done


def test_an_interrupt_waits_for_the_end_of_the_pass(model, on_the_toy, reference):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        model.collect(MANY, "layers_output", reduce=interrupted)
    assert signal.getsignal(signal.SIGINT) is before
    assert left_in(model) == (0, 0)
    assert tokens(model) == reference["greedy"]


def test_generations_and_traces_that_are_cut_short_leave_nothing_in_the_engine(model, on_the_toy, reference):
    with cut_short(1):
        model.run(GIVEN, NEW, ignore_eos=True)
    assert left_in(model) == (0, 0)
    with cut_short(0), model.trace(GIVEN[0]):
        model.logits.save()
    assert left_in(model) == (0, 0)
    assert tokens(model) == reference["greedy"]


def test_steered_and_collected_generations_take_as_many_passes_as_plain_ones(model, on_the_toy, reference):
    """One that ends makes room for another: a request that ends at once does not hold up the next."""
    passes, step = [], CleanEngine.step

    def counted(self):
        passes.append(self.get_num_unfinished_requests())
        return step(self)

    def made(work):
        passes.clear()
        work()
        return len(passes)

    stop = {"stop_token_ids": [new[0] for new in reference["greedy"]]}  # the prompts of `GIVEN` end after one token
    mixed = [ids for pair in zip(MANY, [GIVEN[i % 3] for i in range(len(MANY))], strict=True) for ids in pair]
    vector = 0 * reference["vector"]
    with mock.patch.object(CleanEngine, "step", counted):
        plain = made(lambda: model.run(mixed, NEW, **stop))
        with model.steering(vector, list(STEERED)):
            steered = made(lambda: model.run(mixed, NEW, **stop))
        collected = made(lambda: model.collect(mixed, "layers_output", max_new_tokens=NEW, reduce="mean", **stop))
        read = made(lambda: model.collect(mixed, "layers_output", reduce="mean"))
    assert plain == steered == collected
    assert read <= len(mixed) / 32 + 2
    assert plain < NEW * (len(mixed) / 32 - 1)  # what batches that wait for their longest would take at the least


def test_arguments_that_vllm_does_not_take(model, on_the_toy):
    for name, value, match in (("batch_size", 4, "max_num_seqs"), ("remote", True, "on this machine")):
        with pytest.raises(TypeError, match=match):
            model.collect(GIVEN, "layers_output", **{name: value})
    with pytest.raises(TypeError, match="needs max_new_tokens"):
        model.collect(GIVEN, "layers_output", temperature=1.0)
    with pytest.raises(ValueError, match="n times"):
        model.collect(GIVEN, "layers_output", max_new_tokens=2, n=2)
    with pytest.raises(ValueError, match="to=folder"):
        model.collect(GIVEN, "layers_output", rank=(0, 2))
    with pytest.raises(ValueError, match="at least 1"):
        model.collect(GIVEN, "layers_output", max_new_tokens=0)
