"""A call that is cut short carries what it had computed, and the same call goes on from there.

Numbers agree up to rounding: two runs of a matrix product on several threads differ there as well.
"""

from __future__ import annotations

import contextlib
import random
import signal
import sys

import pytest
import torch

from nnterp import StandardizedTransformer
from nnterp.collection import Collected
from nnterp.interventions import (
    Component,
    Result,
    TargetPrompt,
    ablate,
    activation_patching,
    attribution_patching,
    components,
    logit_difference,
    logit_lens,
    logit_lens_table,
    patch_object_attn_lens,
    patchscope_generate,
    patchscope_lens,
    patchscope_table,
    path_patching,
)
from nnterp.testing import tiny_model, tiny_tokenizer

CLEAN = [[11, 42, 57, 93, 130], [60, 77, 101, 15], [9, 12, 31, 40, 8], [60, 78, 101, 15]] * 3
CORRUPTED = [[11, 42, 99, 93, 131], [60, 31, 101, 18], [9, 13, 31, 41, 8], [61, 78, 10, 15]] * 3
METRIC = logit_difference(5, 9)


@pytest.fixture(scope="module")
def model():
    return StandardizedTransformer(tiny_model("llama"), tokenizer=tiny_tokenizer())


def senders(model):
    return components(model, "attention_head_outputs", [0, 1], "all")


CALLS = {
    "activation_patching": lambda m, **k: activation_patching(m, CLEAN, CORRUPTED, METRIC, batch_size=7, **k),
    "activation_patching, values": lambda m, **k: activation_patching(
        m,
        CLEAN,
        CORRUPTED,
        METRIC,
        ["attention_contributions", "mlp_contributions"],
        [0, 2],
        [0, -1],
        direction="noising",
        batch_size=5,
        **k,
    ),
    "activation_patching, heads": lambda m, **k: activation_patching(
        m, CLEAN[:2], CORRUPTED[:2], METRIC, "attention_head_outputs", [1], heads="all", batch_size=2, **k
    ),
    "ablate": lambda m, **k: ablate(m, CLEAN, components(m, "mlps_output"), batch_size=5, **k),
    "ablate, mean": lambda m, **k: ablate(m, CLEAN[:3], components(m, "mlps_output"), "mean", batch_size=2, **k),
    "ablate, resample": lambda m, **k: ablate(m, CLEAN, Component("mlps_output", 1), "resample", batch_size=4, **k),
    "path_patching": lambda m, **k: path_patching(
        m, CLEAN[:3], CORRUPTED[:3], senders(m), "logits", METRIC, batch_size=3, **k
    ),
    "patchscope_lens": lambda m, **k: patchscope_lens(m, CLEAN, TargetPrompt("a b c ?", -1), batch_size=5, **k),
    "patchscope_table": lambda m, **k: patchscope_table(m, CLEAN, TargetPrompt("a b c ?", -1), batch_size=5, **k),
    "patch_object_attn_lens": lambda m, **k: patch_object_attn_lens(m, CLEAN[:1], CORRUPTED, -1, batch_size=9, **k),
    "patchscope_generate": lambda m, **k: patchscope_generate(
        m, CLEAN, TargetPrompt("a b c ?", -1), 4, [0, 1], batch_size=5, do_sample=False, **k
    ),
    "logit_lens": lambda m, **k: logit_lens(m, CLEAN, batch_size=3, **k),
    "logit_lens, targets": lambda m, **k: logit_lens(
        m, CLEAN, targets=[5] * 12, positions=[0, -1], layers=[2, 0], batch_size=3, return_inv_logits=True, **k
    ),
    "logit_lens_table": lambda m, **k: logit_lens_table(m, CLEAN, 3, targets=[[5, [6, 7]]] * 12, batch_size=3, **k),
    "collect": lambda m, **k: m.collect(CLEAN, ["layers_output", "logits", "next_token_probs"], batch_size=3, **k),
    "collect, mean": lambda m, **k: m.collect(CLEAN, "mlps_output", batch_size=3, reduce="mean", **k),
    "collect, function": lambda m, **k: m.collect(
        CLEAN, "mlps_output", batch_size=3, reduce=lambda t: t.norm(dim=-1), **k
    ),
    "collect, generation": lambda m, **k: m.collect(
        CLEAN, ["layers_output"], batch_size=3, max_new_tokens=3, do_sample=False, pad_token_id=0, **k
    ),
    "collect, generation, sum": lambda m, **k: m.collect(
        CLEAN, "layers_output", batch_size=3, max_new_tokens=3, reduce="sum", do_sample=False, pad_token_id=0, **k
    ),
}
STEPS = {"collect, generation": 3, "collect, generation, sum": 3, "patchscope_generate": 4}  # forwards of one batch


class Boom(Exception):
    pass


@contextlib.contextmanager
def forwards(model, stop=None, error=Boom):
    """Counts forward passes of the module; the one numbered `stop` raises `error`."""
    count = [0]

    def hook(*_):
        count[0] += 1
        if count[0] == stop:
            raise error("stopped here")

    handle = model._module.register_forward_pre_hook(hook)
    try:
        yield count
    finally:
        handle.remove()


def tensors(found):
    """Every tensor of what a call returned."""
    if isinstance(found, torch.Tensor):
        return [found]
    if isinstance(found, tuple):
        return [tensor for part in found for tensor in tensors(part)]
    if isinstance(found, Result):
        return list(found.tensors.values())
    if isinstance(found, Collected):
        more = [t for t in (found.mask, found.generated) if t is not None]
        return [found[name] for name in found] + more
    return list(found.values())


def equal(found, expected):
    for one, other in zip(tensors(found), tensors(expected), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6, equal_nan=True)


@pytest.mark.parametrize("name", CALLS)
def test_an_interrupted_call_goes_on_where_it_was(model, name, tmp_path):
    call = CALLS[name]
    call(model)  # finds the shortcuts and counts heads
    with forwards(model) as count:
        whole = call(model)
    total, kept = count[0], 0
    for stop in range(1, total + 1):
        error = (KeyboardInterrupt, Boom)[stop % 2]
        with pytest.raises(error) as caught, forwards(model, stop, error):
            call(model)
        partial = getattr(caught.value, "partial", None)
        if partial is None:
            continue
        done = len(partial.done) if isinstance(partial, Collected) else int(partial["done"].sum())
        if not done:
            continue
        kept += 1
        partial.save(tmp_path / f"partial{stop}")
        with forwards(model) as count:
            again = call(model, resume=partial if stop % 2 else tmp_path / f"partial{stop}")
        equal(again, whole)
        # Beside the batch that failed, only the unedited runs that the rest needs are repeated.
        batch = STEPS.get(name, 1)
        unedited = 0 if name.startswith(("collect", "logit_lens")) else 4
        assert count[0] <= total - (stop - 1) + batch + unedited
    assert kept >= min(2, total - 3), "hardly any interruption kept something"


def test_what_is_not_done_is_nan_and_what_is_done_is_right(model):
    whole = activation_patching(model, CLEAN, CORRUPTED, METRIC, batch_size=7)
    with forwards(model) as count:
        activation_patching(model, CLEAN, CORRUPTED, METRIC, batch_size=7)
    with pytest.raises(Boom) as caught, forwards(model, count[0] // 2):
        activation_patching(model, CLEAN, CORRUPTED, METRIC, batch_size=7)
    partial = caught.value.partial
    assert type(partial) is type(whole)
    assert partial.axes["done"] == partial.axes["scores"]
    done = partial["done"]
    exists = ~whole["scores"].isnan()
    assert 0 < (done & exists).sum() < exists.sum()
    torch.testing.assert_close(partial["scores"][done & exists], whole["scores"][done & exists], atol=1e-6, rtol=1e-6)
    assert partial["scores"][~done].isnan().all()
    assert "resume=error.partial" in "".join(caught.value.__notes__)


def nothing(logits):
    raise Boom


NOTHING_DONE = {
    "activation_patching": lambda m, metric: activation_patching(m, CLEAN, CORRUPTED, metric),
    "attribution_patching": lambda m, metric: attribution_patching(m, CLEAN[:1], CORRUPTED[:1], metric, audit=0),
    "ablate": lambda m, metric: ablate(m, CLEAN, Component("mlps_output", 1), "zero", metric),
    "path_patching": lambda m, metric: path_patching(m, CLEAN, CORRUPTED, senders(m), "logits", metric),
}


@pytest.mark.parametrize("call", NOTHING_DONE.values(), ids=NOTHING_DONE)
@pytest.mark.parametrize("metric", [logit_difference("several tokens", 9), nothing], ids=["targets", "metric"])
def test_an_error_before_anything_is_done_promises_nothing(model, call, metric):
    with pytest.raises((ValueError, Boom)) as caught:
        call(model, metric)
    assert not hasattr(caught.value, "partial")
    assert "partial" not in "".join(getattr(caught.value, "__notes__", []))


def cut_short(model, call):
    call()  # proves the shortcuts, which takes forward passes of its own the first time
    with forwards(model) as count:
        call()
    for stop in range(count[0], 0, -1):
        with pytest.raises(Boom) as caught, forwards(model, stop):
            call()
        partial = getattr(caught.value, "partial", None)
        if partial is not None:
            return partial
    raise AssertionError("nothing was kept")


OTHER_RUNS = {
    "prompts": lambda m, r: activation_patching(m, CORRUPTED, CLEAN, METRIC, resume=r),
    "layers": lambda m, r: activation_patching(m, CLEAN, CORRUPTED, METRIC, layers=[0], resume=r),
    "positions": lambda m, r: activation_patching(m, CLEAN, CORRUPTED, METRIC, positions=[0], resume=r),
    "direction": lambda m, r: activation_patching(m, CLEAN, CORRUPTED, METRIC, direction="noising", resume=r),
    "values": lambda m, r: activation_patching(m, CLEAN, CORRUPTED, METRIC, "mlp_contributions", resume=r),
    "metric": lambda m, r: activation_patching(m, CLEAN, CORRUPTED, logit_difference(5, 10), resume=r),
    "metric .*": lambda m, r: activation_patching(m, CLEAN, CORRUPTED, lambda logits: logits[:, 5], resume=r),
    "function": lambda m, r: ablate(m, CLEAN, Component("mlps_output", 0), resume=r),
}


@pytest.mark.parametrize("what", OTHER_RUNS)
def test_another_run_is_refused(model, what):
    partial = cut_short(model, lambda: activation_patching(model, CLEAN, CORRUPTED, METRIC, batch_size=7))
    with pytest.raises(ValueError, match=rf"Cannot resume: .*{what}"):
        OTHER_RUNS[what](model, partial)


def test_another_model_and_other_weights_are_refused(model):
    partial = cut_short(model, lambda: activation_patching(model, CLEAN, CORRUPTED, METRIC, batch_size=7))
    other = StandardizedTransformer(tiny_model("mistral"), tokenizer=tiny_tokenizer())
    with pytest.raises(ValueError, match=r"Cannot resume: .*model_class = 'LlamaForCausalLM'"):
        activation_patching(other, CLEAN, CORRUPTED, METRIC, resume=partial)
    weight = model._module.model.layers[1].mlp.down_proj.weight
    with torch.no_grad():
        weight[0, 0] += 1
    try:
        with pytest.raises(ValueError, match=r"Cannot resume: .*weights = "):
            activation_patching(model, CLEAN, CORRUPTED, METRIC, batch_size=7, resume=partial)
    finally:
        with torch.no_grad():
            weight[0, 0] -= 1


def test_collections_of_another_kind_are_refused(model):
    partial = cut_short(model, lambda: model.collect(CLEAN, "layers_output", batch_size=3, progress=False))
    changed = {
        "prompts": lambda: model.collect(CORRUPTED, "layers_output", resume=partial),
        "values": lambda: model.collect(CLEAN, "mlps_output", resume=partial),
        "positions": lambda: model.collect(CLEAN, "layers_output", positions=-1, resume=partial),
        "dtype": lambda: model.collect(CLEAN, "layers_output", dtype=torch.float64, resume=partial),
        "reduce": lambda: model.collect(CLEAN, "layers_output", reduce="mean", resume=partial),
        "max_new_tokens": lambda: model.collect(CLEAN, "layers_output", max_new_tokens=2, resume=partial),
    }
    for what, call in changed.items():
        with pytest.raises(ValueError, match=f"Cannot resume: .*{what}"):
            call()
    whole = model.collect(CLEAN, "layers_output", progress=False)
    with pytest.raises(ValueError, match="is no partial result"):
        model.collect(CLEAN, "layers_output", resume=whole)


def test_a_complete_result_is_nothing_to_resume(model, tmp_path):
    whole = ablate(model, CLEAN[:2], Component("mlps_output", 0))
    whole.save(tmp_path / "whole")
    for given in (whole, tmp_path / "whole"):
        with pytest.raises(ValueError, match="is no partial result"):
            ablate(model, CLEAN[:2], Component("mlps_output", 0), resume=given)
    with pytest.raises(FileNotFoundError):
        ablate(model, CLEAN[:2], Component("mlps_output", 0), resume=tmp_path / "nothing")


def test_a_partial_mean_is_that_of_the_prompts_done(model):
    partial = cut_short(
        model, lambda: model.collect(CLEAN, "layers_output", batch_size=3, reduce="mean", progress=False)
    )
    own = [CLEAN[i] for i in sorted(partial.done)]
    expected = model.collect(own, "layers_output", reduce="mean", progress=False)
    torch.testing.assert_close(partial["layers_output"], expected["layers_output"], atol=1e-5, rtol=1e-5)
    changed_size = model.collect(CLEAN, "layers_output", batch_size=4, reduce="mean", progress=False, resume=partial)
    whole = model.collect(CLEAN, "layers_output", reduce="mean", progress=False)
    torch.testing.assert_close(changed_size["layers_output"], whole["layers_output"], atol=1e-5, rtol=1e-5)


def test_a_metric_that_counts_its_calls_can_go_on(model):
    calls = []

    def metric(logits):
        calls.append(1)
        if len(calls) == 13:  # after the first batch, whose runs are scored layer by layer
            raise Boom
        return logits[:, 5] - logits[:, 9]

    with pytest.raises(Boom) as caught:
        activation_patching(model, CLEAN, CORRUPTED, metric, batch_size=7)
    assert 0 < caught.value.partial["done"].sum() < caught.value.partial["done"].numel()
    again = activation_patching(model, CLEAN, CORRUPTED, metric, batch_size=7, resume=caught.value.partial)
    torch.testing.assert_close(again["scores"], CALLS["activation_patching"](model)["scores"], equal_nan=True)


PROGRAM = """
import signal
import sys
import torch
from nnterp import StandardizedTransformer
from nnterp.interventions import Result, activation_patching, logit_difference
from nnterp.testing import tiny_model, tiny_tokenizer

model = StandardizedTransformer(tiny_model("llama"), tokenizer=tiny_tokenizer())
clean, corrupted = [[i + 11, 42, 57, 93, 130] for i in range(16)], [[i + 11, 42, 99, 93, 131] for i in range(16)]
call = lambda **more: activation_patching(model, clean, corrupted, logit_difference(5, 9), batch_size=5, **more)
whole = call()
model._module.register_forward_pre_hook(lambda *_: print("forward", flush=True))
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin with it ignored
try:
    call()
except KeyboardInterrupt as error:
    partial = error.partial
    partial.save(sys.argv[1])
    done = partial["done"]
    assert 0 < done.sum() < done.numel()
    again = call(resume=sys.argv[1])
    torch.testing.assert_close(partial["scores"][done], whole["scores"][done], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(again["scores"], whole["scores"], atol=1e-5, rtol=1e-5)
    print("went on", flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_a_real_interrupt(processes, tmp_path):
    with processes.running(PROGRAM, str(tmp_path / "partial")) as child:
        for _ in range(random.randint(5, 30)):  # of 36
            assert child.stdout.readline() == "forward\n", child.said
        child.send(signal.SIGINT)
        assert child.stdout.read().endswith("went on\n"), child.said
        assert child.wait() == 0, child.said
