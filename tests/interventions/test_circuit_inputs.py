"""Edge attribution and faithfulness: calls that are cut short, and input from which no number may come."""

from __future__ import annotations

import pytest
import torch

from nnterp import StandardizedTransformer
from nnterp.errors import RemoteModelError
from nnterp.interventions import (
    Circuit,
    Faithfulness,
    Result,
    edge_attribution,
    faithfulness,
    logit_difference,
    patch_subspace,
)
from nnterp.testing import tiny_model, tiny_tokenizer

from .test_circuits import BOTH, CLEAN, CORRUPTED, close, linear, scores_of

SIZES = (0.1, 1.0)


class Cut(Exception):
    pass


def cutting(metric, after):
    """The metric, whose call number `after` raises."""
    calls = []

    def counted(logits):
        calls.append(1)
        if len(calls) == after:
            raise Cut
        return metric(logits)

    return counted, calls


@pytest.mark.parametrize("saved", [False, True])
def test_edge_attribution_goes_on_where_it_was_cut_short(tiny, tmp_path, saved):
    model = tiny("llama")
    options = {"by_pair": True, "batch_size": 1, "audit": 4}
    whole = edge_attribution(model, *BOTH, linear(model), **options)
    metric, calls = cutting(linear(model), 3)
    with pytest.raises(Cut) as caught:
        edge_attribution(model, *BOTH, metric, **options)
    partial = caught.value.partial
    assert isinstance(partial, Circuit)
    assert partial.about["pairs"] == [0]
    assert "resume=error.partial" in "".join(caught.value.__notes__)
    if saved:
        partial.save(tmp_path / "partial")
    before = len(calls)
    again = edge_attribution(model, *BOTH, metric, **options, resume=tmp_path / "partial" if saved else partial)
    assert len(calls) - before == 2 + 2 * 4  # one pair: a gradient and its run's metric; the audit of both
    close(scores_of(again), scores_of(whole))
    close(scores_of(again, 1), scores_of(whole, 1))
    exact = {(c["sender"], c["receiver"]): c["exact"] for c in whole.audit.cells}
    assert {(c["sender"], c["receiver"]): pytest.approx(c["exact"], abs=1e-4) for c in again.audit.cells} == exact
    assert "pairs" not in again.about
    with pytest.raises(ValueError, match=r"Cannot resume: .*no partial result"):
        edge_attribution(model, *BOTH, metric, **options, resume=whole)
    with pytest.raises(ValueError, match=r"Cannot resume: .*direction"):
        edge_attribution(model, *BOTH, metric, direction="denoising", by_pair=True, resume=partial)
    with pytest.raises(ValueError, match=r"Cannot resume: .*prompts"):
        edge_attribution(model, BOTH[1], BOTH[0], metric, by_pair=True, resume=partial)
    with pytest.raises(FileNotFoundError):
        edge_attribution(model, *BOTH, metric, resume=tmp_path / "nothing")


def test_faithfulness_goes_on_where_it_was_cut_short(tiny, tmp_path):
    model = tiny("gpt2")
    circuit = edge_attribution(model, *BOTH, linear(model), audit=0)
    call = {"sizes": SIZES, "controls": 1, "batch_size": 1}
    whole = faithfulness(model, circuit, *BOTH, linear(model), **call)
    metric, calls = cutting(linear(model), 9)
    with pytest.raises(Cut) as caught:
        faithfulness(model, circuit, *BOTH, metric, **call)
    partial = caught.value.partial
    assert isinstance(partial, Faithfulness)
    assert partial["done"].tolist() == [True, False]
    assert partial["by_prompt"][0].isfinite().all()
    assert partial["by_prompt"][1].isnan().all()
    partial.save(tmp_path / "partial")
    before = len(calls)
    again = faithfulness(model, circuit, *BOTH, metric, **call, resume=tmp_path / "partial")
    assert len(calls) - before == 2 + 2 * 2
    for name in whole.tensors:
        torch.testing.assert_close(again[name], whole[name], atol=1e-5, rtol=1e-5)
    assert isinstance(Result.load(tmp_path / "partial"), Faithfulness)
    with pytest.raises(ValueError, match=r"Cannot resume: .*sizes"):
        faithfulness(model, circuit, *BOTH, metric, 0.2, 1, resume=partial)
    with pytest.raises(ValueError, match=r"Cannot resume: .*edges"):
        other = edge_attribution(model, BOTH[1], BOTH[0], linear(model), audit=0)
        faithfulness(model, other, *BOTH, metric, **call, resume=partial)
    with pytest.raises(ValueError, match="no partial result"):
        faithfulness(model, circuit, *BOTH, metric, **call, resume=whole)


def test_remote_runs_are_refused(tiny):
    model = tiny("gpt2")
    with pytest.raises(RemoteModelError, match=r"edge_attribution\(remote=...\) is refused: .*Load the weights"):
        edge_attribution(model, CLEAN, CORRUPTED, linear(model), remote=True)
    circuit = edge_attribution(model, CLEAN, CORRUPTED, linear(model), audit=0)
    with pytest.raises(RemoteModelError, match=r"faithfulness\(remote=...\) is refused"):
        faithfulness(model, circuit, CLEAN, CORRUPTED, linear(model), remote=True)


def nan(logits):
    return logits[:, 5] * torch.nan


def infinite(logits):
    return logits[:, 5] / 0


def constant(logits):
    return logits.new_ones(len(logits))


def of_ids(logits):
    return logits.argmax(-1).float()


def scalar(logits):
    return logits.mean()


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (nan, "not finite"),
        (infinite, "not finite"),
        (constant, "does not depend on the logits"),
        (of_ids, "does not depend on the logits"),
        (scalar, "one number for each run"),
        (logit_difference("The capital", 3), "is 2 tokens"),
        (logit_difference(10**6, 3), "There is no token 1000000"),
        (logit_difference(-1, 3), "There is no token -1"),
        (logit_difference([1, 2, 3], 3), "3 entries for 2 prompts"),
    ],
)
def test_metrics_that_give_no_score_are_refused(tiny, metric, message):
    with pytest.raises(ValueError, match=message):
        edge_attribution(tiny("gpt2"), *BOTH, metric, audit=2)


@pytest.mark.parametrize("metric", [nan, infinite])
def test_faithfulness_of_a_metric_that_is_no_number_is_refused(tiny, metric):
    model = tiny("gpt2")
    circuit = edge_attribution(model, *BOTH, linear(model), audit=0)
    with pytest.raises(ValueError, match="not finite"):
        faithfulness(model, circuit, *BOTH, metric, SIZES, controls=0)


@pytest.mark.parametrize(
    ("clean", "corrupted", "message"),
    [
        ([], [], "No prompts were given"),
        ("", "", "has no tokens"),
        ([CLEAN], [CORRUPTED[:-1]], "Pair 0: the clean prompt has 7 tokens and the corrupted one 6"),
        ([CLEAN, CLEAN], [CORRUPTED], "2 clean prompts and 1 corrupted"),
        ([[5, 10**6]], [[5, 9]], "1000000"),
    ],
)
def test_prompts_that_go_in_no_pairs_are_refused(tiny, clean, corrupted, message):
    with pytest.raises((ValueError, IndexError), match=message):
        edge_attribution(tiny("gpt2"), clean, corrupted, linear(tiny("gpt2")))


def test_choices_that_are_no_numbers_are_refused(tiny):
    model = tiny("gpt2")
    circuit = edge_attribution(model, CLEAN, CORRUPTED, linear(model), audit=0)
    for least in (float("nan"), "0.1", None):
        with pytest.raises(ValueError, match="least is the smallest absolute score"):
            circuit.threshold(least)
    with pytest.raises(TypeError, match="seed"):
        faithfulness(model, circuit, CLEAN, CORRUPTED, linear(model), 1.0, seed="first")
    assert len(edge_attribution(model, CLEAN, CORRUPTED, linear(model), audit=10**6).audit) == circuit.total


def test_a_projection_that_is_hooked_later_is_not_taken_for_its_matrix(tiny):
    """The short way through a projection's matrix would miss what the hook does to the gradient."""
    model = StandardizedTransformer(tiny_model("llama"), tokenizer=tiny_tokenizer())
    metric = linear(model)
    plain = edge_attribution(model, CLEAN, CORRUPTED, metric, audit=0)
    module = model._module.model.layers[1].self_attn.q_proj
    handle = module.register_forward_hook(lambda m, args, output: output * 2)
    hooked = edge_attribution(model, CLEAN, CORRUPTED, metric, audit=6)
    handle.remove()
    with torch.no_grad():
        module.weight *= 2
    doubled = edge_attribution(model, CLEAN, CORRUPTED, metric, audit=0)
    close(scores_of(hooked), scores_of(doubled))
    assert (hooked.scores - plain.scores).abs().max() > 1e-2


def test_a_subspace_of_no_layer_is_refused(tiny):
    model = tiny("gpt2")
    basis = torch.eye(model.hidden_size)[:, :2]
    for layer in (model.num_layers, -model.num_layers - 1):
        with pytest.raises(IndexError):
            patch_subspace(model, *BOTH, linear(model), "layers_output", layer, basis)
    last = patch_subspace(model, *BOTH, linear(model), "layers_output", -1, basis, controls=1)
    named = patch_subspace(model, *BOTH, linear(model), "layers_output", model.num_layers - 1, basis, controls=1)
    torch.testing.assert_close(last["scores"], named["scores"])
    assert patch_subspace(model, *BOTH, nan, "layers_output", 1, basis)["scores"].isnan().all()


def test_left_padding_in_the_users_encoding_is_refused_or_right(tiny):
    """Prompts of different lengths never share a batch, so that scores do not depend on who else is asked for."""
    model = tiny("gpt2")
    both = edge_attribution(model, *BOTH, linear(model), audit=0, by_pair=True, batch_size=8)
    alone = edge_attribution(model, *(side[1] for side in BOTH), linear(model), audit=0)
    close(scores_of(both, 1), scores_of(alone))


def test_in_half_precision_scores_are_near_those_of_float32(tiny):
    module = tiny_model("llama").to(torch.bfloat16)
    half = StandardizedTransformer(module, tokenizer=tiny_tokenizer())
    metric = logit_difference(5, 9)
    found = edge_attribution(half, CLEAN, CORRUPTED, metric, audit=4)
    whole = edge_attribution(tiny("llama"), CLEAN, CORRUPTED, metric, audit=0)
    a = torch.tensor([whole.score(*edge) for edge in scores_of(found)])
    b = torch.tensor(list(scores_of(found).values()))
    assert float(torch.corrcoef(torch.stack([a, b]))[0, 1]) > 0.97
    assert found.scores.dtype == torch.float32
    assert found.completeness < 0.05
