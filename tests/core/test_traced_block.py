"""Blocks that read in another order than the forward pass: run as printed, or told in which order they work."""

from __future__ import annotations

import ast
import random
import sys
import textwrap
import types

import nnsight
import pytest
import torch
from nnsight.intervention.interleaver import OutOfOrderError
from nnsight.intervention.tracer import InterleavingTracer

from nnterp import StandardizedTransformer
from nnterp.testing import tiny_model, tiny_tokenizer
from nnterp.traced_block import BlockTracer
from nnterp.traced_block._followed import entered

IDS = [[5, 9, 12, 7]]
TYPES = ["gpt2", "llama", "gpt_neox", "bloom", "gemma2", "mixtral", "mamba", "falcon", "jamba"]


@pytest.fixture(scope="module")
def built():
    made: dict[str, StandardizedTransformer] = {}

    def build(model_type: str) -> StandardizedTransformer:
        if model_type not in made:
            module = tiny_model(model_type)
            made[model_type] = StandardizedTransformer(
                module, tokenizer=tiny_tokenizer(), enable_attention_probs=model_type != "mamba"
            )
        return made[model_type]

    return build


@pytest.fixture
def model(built):
    return built("gpt2")


INSIDE = {f"mixer_{name}" for name in ("queries", "keys", "values", "decays", "betas", "steps")}


def block(tmp_path, lines: list[str]):
    """A function whose trace holds these lines and returns what they bind to `found`."""
    path = tmp_path / f"block_{abs(hash(tuple(lines)))}.py"
    text = "def run(model, ids):\n    with model.trace(ids):\n"
    text += "".join(f"        {line}\n" for line in lines) + "    return found\n"
    path.write_text(text)
    scope = {"nnsight": nnsight}
    exec(compile(text, str(path), "exec"), scope)
    return scope["run"]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("model_type", TYPES)
def test_reads_in_any_order_equal_each_read_alone(built, tmp_path, model_type, seed):
    """The reference: for each value a trace of its own, which reads nothing else."""
    model, rng = built(model_type), random.Random(seed)
    support = model.support()
    have = [(name, layer) for name, layers in support.layers.items() for layer in layers]
    chosen = rng.sample(have, 8)
    # A state is read from before its mixer to after it, so that what is inside the mixer needs another trace.
    chosen = [(name, layer) for name, layer in chosen if name not in INSIDE or ("mixer_states", layer) not in chosen]
    expected = []
    with torch.no_grad():
        for name, layer in chosen:
            with model.trace(IDS):
                expected.append(getattr(model, name)[layer].clone().save())
        whole = [("token_embeddings", None), ("ln_final_output", None), ("logits", None)]
        for name, _ in whole:
            with model.trace(IDS):
                expected.append(getattr(model, name).clone().save())
        order = list(range(len(expected)))
        rng.shuffle(order)
        reads = [f"{name}" if layer is None else f"{name}[{layer}]" for name, layer in [*chosen, *whole]]
        lines = [f"v{i} = model.{reads[i]}.clone()" for i in order]
        last = "found = nnsight.save([" + ", ".join(f"v{i}" for i in range(len(reads))) + "])"
        found = block(tmp_path, [*lines, last])(model, IDS)
    for read, one, other in zip(reads, found, expected, strict=True):
        assert torch.equal(one, other), read


def test_a_block_that_reads_in_order_is_run_as_it_is(model):
    with torch.no_grad():
        with model.trace(IDS):
            early = model.attentions_output[0].save()
            late = model.layers_output[1].save()
        assert early.shape == late.shape
    assert None in model._sorted_blocks.values()
    assert all(code is None for code in list(model._sorted_blocks.values())[-1:])


def test_reads_of_an_invoke(model):
    with torch.no_grad():
        with model.trace() as tracer:
            with tracer.invoke(IDS):
                late = model.layers_output[1].save()
                early = model.attentions_output[0].save()
            with tracer.invoke(IDS):
                alone = model.attentions_output[0].save()
        with model.trace(IDS):
            last = model.layers_output[1].save()
    assert torch.equal(early, alone)
    assert torch.equal(late, last)


class Holder:
    def __init__(self, model):
        self.model = model

    def run(self):
        with torch.no_grad(), self.model.trace(IDS) as tracer:
            late = self.model.layers_output[1].save()
            early = self.model.attentions_output[0].save()
            tracer.stop()
        return early, late


def test_a_model_that_is_an_attribute(model):
    early, late = Holder(model).run()
    with torch.no_grad(), model.trace(IDS):
        first = model.attentions_output[0].save()
        second = model.layers_output[1].save()
    assert torch.equal(early, first)
    assert torch.equal(late, second)


def test_one_block_for_models_of_other_orders(built, tmp_path):
    # Falcon's own code edits in place what its feed-forward returned.
    lines = ["a = model.mlps_output[1].clone()", "b = model.attentions_output[1].clone()"]
    run = block(tmp_path, [*lines, "found = nnsight.save([a, b])"])
    alone = block(tmp_path, [lines[0], "found = nnsight.save([a])"])
    with torch.no_grad():
        for model_type in ("llama", "falcon", "gpt_neox", "llama"):
            assert torch.equal(run(built(model_type), IDS)[0], alone(built(model_type), IDS)[0])


def test_nothing_but_what_was_saved_leaves_the_block(model, tmp_path):
    lines = ["a = model.layers_output[1].save()", "b = model.attentions_output[0].save()", "found = a"]
    text = "with model.trace(ids):\n" + "".join(f"    {line}\n" for line in lines)
    path = tmp_path / "top.py"
    path.write_text(text)
    scope = {"model": model, "ids": IDS}
    with torch.no_grad():
        exec(compile(text, str(path), "exec"), scope)
    assert {name for name in scope if not name.startswith("__")} == {"model", "ids", "a", "b", "found"}


WRITES = {
    "assignment": ["model.layers_output[1] = model.layers_output[1] * 2"],
    "in place": ["late = model.layers_output[1]", "late += 1"],
    "entry": ["late = model.layers_output[1]", "late[:, 0] = 0"],
    "method": ["model.layers_output[1].zero_()"],
    "argument": ["late = model.layers_output[1]", "torch.add(late, 1, out=late)"],
    "steering": ["late = model.layers_output[1]", "model.steer(1, torch.ones(model.hidden_size))"],
    "skipping": ["late = model.layers_output[0]", "model.skip_layer(1)", "late = model.layers_output[1]"],
    "function": ["late = model.layers_output[1]", "change(late)"],
    "envoy": ["late = model.layers_output[1]", "model.layers[1].output"],
}


@pytest.mark.parametrize("lines", WRITES.values(), ids=WRITES)
def test_a_block_that_may_write_is_not_touched(model, tmp_path, lines):
    run = block(tmp_path, [*lines, "found = model.attentions_output[0].save()"])
    run.__globals__.update(torch=torch, change=lambda tensor: tensor.zero_())
    with torch.no_grad(), pytest.raises(OutOfOrderError, match=r"attentions_output\[0\]"):
        run(model, IDS)


def test_the_error_shows_the_lines_in_the_order_that_works(model, tmp_path):
    lines = [
        "late = model.layers_output[1].save()",
        "model.layers_output[1] = late * 2",
        "found = model.mlps_output[0].save()",
    ]
    with torch.no_grad(), pytest.raises(OutOfOrderError) as caught:
        block(tmp_path, lines)(model, IDS)
    shown = [line.strip() for line in str(caught.value.args[0]).split("the block work:\n")[1].splitlines()]
    assert shown == [lines[2], lines[0], lines[1]]
    with torch.no_grad():
        block(tmp_path, shown)(model, IDS)


def test_the_error_in_a_loop_shows_its_lines(model, tmp_path):
    lines = ["for i in range(2):", "    late = model.layers_output[i].save()", "    found = model.mlps_input[i].save()"]
    with torch.no_grad(), pytest.raises(OutOfOrderError, match="mlps_input") as caught:
        block(tmp_path, lines)(model, IDS)
    shown = [line.strip() for line in str(caught.value.args[0]).split("the block work:\n")[1].splitlines()]
    assert shown == [lines[2].strip(), lines[1].strip()]


def test_lines_that_need_each_other_are_not_shown_in_an_order_that_cannot_work(model, tmp_path):
    lines = ["late = model.layers_output[1]", "model.layers_output[0] = late", "found = model.logits.save()"]
    with torch.no_grad(), pytest.raises(OutOfOrderError) as caught:
        block(tmp_path, lines)(model, IDS)
    assert "lines of the block work" not in str(caught.value)


def test_traces_use_it_where_they_run_here(model):
    assert isinstance(model.trace(IDS), BlockTracer)
    assert not isinstance(model.trace(IDS, remote="local"), BlockTracer)
    assert isinstance(model.trace(IDS, tracer_cls=InterleavingTracer), InterleavingTracer)


def opened(model, what):
    """A tracer, made in a function, so that its `with` does not say what it is."""
    return getattr(model, what)(**({} if what in ("session", "edit") else {"input_ids": IDS}))


@pytest.mark.parametrize("what", ["trace", "scan", "session", "edit"])
def test_what_follows_a_tracer_in_its_with_is_refused(model, what):
    """It would be over before the model runs: the numbers would be those of the plain model."""
    vector, calls = torch.ones(model.hidden_size), types.SimpleNamespace(steering=model.steering)
    with pytest.raises(ValueError, match="before the model runs"):  # noqa: SIM117
        with opened(model, what), calls.steering(vector, 1):
            model.logits.save()
    calls.tracer = [opened(model, what)]
    with pytest.raises(ValueError, match=r"`with calls.tracer\[0\], calls.steering\(vector, 1\):` leaves calls.st"):  # noqa: SIM117
        with calls.tracer[0], torch.no_grad(), calls.steering(vector, 1):
            model.logits.save()
    assert not model.standing
    assert not model._edits


class Entered:
    """A context that notes which item of its `with`, the last of `source`, `entered` takes it for."""

    def __init__(self, items, noted):
        self.items, self.noted = items, noted

    def __enter__(self):
        self.noted.append(entered(self.items, sys._getframe(1)))

    def __exit__(self, *_):
        pass


@pytest.mark.parametrize("indented", [0, 4])
@pytest.mark.parametrize(
    "header",
    [
        "with made(\n    0\n), made(1):",  # the first ends on the line on which the second begins
        "with made(\n    0\n) as a, made(1) as b:",
        "with c0 as aa, c1 as bb:",  # names of one width
        "with (c0 as aa,\n    c1 as bb, c0 as cc):",
        "with made(0, [\n    c1]), c1 as c2:",
    ],
)
def test_the_item_of_a_with_that_is_entered_is_told_by_its_place(header, indented):
    source = f"{header}\n    pass"
    items = ast.increment_lineno(ast.parse(source), 1).body[0].items
    noted: list[int | None] = []
    one = Entered(items, noted)
    whole = textwrap.indent(source, " " * indented)
    exec(compile(f"if True:\n{whole}" if indented else f"\n{whole}", "<block>", "exec"), {
        "made": lambda *_: one, "c0": one, "c1": one,
    })  # fmt: skip
    assert noted == list(range(len(items)))


def test_a_trace_may_follow_what_ends_on_its_line(model):
    vector = torch.ones(model.hidden_size)
    with model.steering(vector, 1), model.trace(IDS):
        wanted = model.logits.save()
    with model.steering(
        vector, 1
    ), model.trace(IDS):  # fmt: skip
        found = model.logits.save()
    steering, one = model.steering(vector, 1), model.trace(IDS)
    with steering as a_a, one as b_b:
        assert a_a is not b_b
        again = model.logits.save()
    assert torch.equal(found, wanted)
    assert torch.equal(again, wanted)


@pytest.mark.parametrize(
    "line",
    [
        "with model.steering(vector, layers=1): out = model.generate('a b', max_new_tokens=2)",
        "with torch.no_grad(): out = model.generate('a b', max_new_tokens=2)[0]",
        "with model.trace('a b'): out = model.logits.save()",
        "with model.generate('a b', max_new_tokens=2) as tracer: out = tracer.result.save()",
    ],
)
def test_a_block_on_the_line_of_its_with_is_refused_and_shown_as_it_works(model, tmp_path, line):
    file = tmp_path / "block.py"
    file.write_text(line)
    names = {"model": model, "torch": torch, "vector": torch.ones(model.hidden_size)}
    with pytest.raises(ValueError, match="on a line of its own:\nwith") as raised:
        exec(compile(line, str(file), "exec"), names)
    assert model.standing == ()
    works = str(raised.value).partition("own:\n")[2]
    other = tmp_path / "works.py"
    other.write_text(works)
    exec(compile(works, str(other), "exec"), names)
    assert names["out"].shape[-1] in (4, model.vocab_size)


def test_what_follows_a_trace_in_its_with_is_refused(model):
    vector = torch.ones(model.hidden_size)
    with pytest.raises(ValueError, match=r"with model\.steering\(vector, 1\), model\.trace\(IDS\):"):  # noqa: SIM117
        with model.trace(IDS), model.steering(vector, 1):
            model.logits.save()
    with pytest.raises(ValueError, match=r"with model\.steering\(vector, 1\), model\.generate\(IDS, "):  # noqa: SIM117
        with model.generate(IDS, max_new_tokens=1), model.steering(vector, 1):
            model.logits.save()
    with pytest.raises(ValueError, match="before the model runs"), model.trace() as tracer:  # noqa: SIM117
        with tracer.invoke(IDS), model.steering(vector, 1):
            model.logits.save()
    with pytest.raises(ValueError, match="before the model runs"), model.trace() as tracer:
        prompt = tracer.invoke
        with prompt(IDS), model.steering(vector, 1):
            model.logits.save()
    with pytest.raises(ValueError, match="before the model runs"), model.session():
        traced = model.trace
        with (
            torch.no_grad(),
            traced(
                IDS,
            ),
            model.steering(vector, 1),
        ):
            model.logits.save()
    with pytest.raises(ValueError, match="of its own, in the block"), torch.no_grad():  # noqa: SIM117
        with model.trace() as tracer, tracer.invoke(IDS):
            model.logits.save()
    with torch.no_grad(), model.session():  # noqa: SIM117
        with model.trace(IDS), torch.no_grad():
            harmless = model.logits.save()
    with model.trace(IDS):
        plain = model.logits.save()
    with model.steering(vector, 1), model.trace(IDS):
        steered = model.logits.save()
    assert not torch.allclose(plain, steered)
    assert torch.equal(plain, harmless)


def test_an_edited_copy_made_under_a_steering_would_keep_it(model):
    vector = torch.ones(model.hidden_size)
    with model.steering(vector, 1), pytest.raises(ValueError, match=r"with edited\.steering"):
        model.edit()
    with model.trace(IDS):
        plain = model.logits.save()
    with model.edit() as (_, edited):
        edited.layers_output[0] = edited.layers_output[0]
    with edited.trace(IDS):
        same = edited.logits.save()
    with edited.steering(vector, 1), edited.trace(IDS):
        steered = edited.logits.save()
    assert torch.equal(plain, same)
    assert not torch.allclose(plain, steered)
