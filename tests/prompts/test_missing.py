"""Models whose logits are NaN or infinite: no score, no rank, no accuracy, and a warning that counts the prompts."""

import math
import warnings

import pytest
import torch

from nnterp import StandardizedTransformer
from nnterp.interventions import logit_lens
from nnterp.prompts import (
    MissingScoresWarning,
    Prompt,
    PromptResults,
    next_token_probs,
    next_token_probs_unsqueeze,
    run_prompts,
)
from nnterp.testing import tiny_model, tiny_tokenizer

TEXTS = ["The capital of France is", "The", "One", "Paris, Rome and", "The capital of Italy is"]
TARGETS = {"target": "Paris", "other": ["London", "Madrid"]}
FUNCTIONS = [None, next_token_probs, next_token_probs_unsqueeze, logit_lens]


def broken_model(model_type="gpt2", certified=True):
    """A model that gives NaN for every prompt with the word "France" or "Italy", and HuggingFace's own for others."""
    module = tiny_model(model_type)
    model = StandardizedTransformer(module, tokenizer=tiny_tokenizer(), check_renaming=certified)
    ids = {model.tokenizer(f" {word}")["input_ids"][-1] for word in ("France", "Italy")}
    others = {i for text in TEXTS if "capital" not in text for i in model.tokenizer(text)["input_ids"]}
    assert not ids & others
    with torch.no_grad():
        weight = module.get_input_embeddings().weight
        module.get_output_embeddings().weight = torch.nn.Parameter(weight.clone())  # they are tied in GPT-2
        weight[list(ids)] = torch.nan
    return model


BROKEN = torch.tensor(["capital" in text for text in TEXTS])


def make(model):
    return [Prompt.from_strings(text, TARGETS, model) for text in TEXTS]


@torch.no_grad()
def slow(module, tokenizer, prompts):
    """Log-probabilities, and ranks in the vocabulary, one prompt at a time; NaN and 0 where a logit is not finite."""
    logs, ranks = [], []
    for prompt in prompts:
        logits = module(**tokenizer(prompt.prompt, return_tensors="pt")).logits[0, -1].float()
        finite = bool(logits.isfinite().all())
        targets = [list(dict.fromkeys(tokens)) for tokens in prompt.target_tokens.values()]
        logs.append([logits.log_softmax(-1)[t].logsumexp(0).item() if finite else math.nan for t in targets])
        ranks.append([int((logits > logits[t].max()).sum()) + 1 if finite else 0 for t in targets])
    return torch.tensor(logs), torch.tensor(ranks)


@pytest.mark.parametrize("certified", [True, False])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_broken_prompts_beside_good_ones(function, certified):
    if function is logit_lens and not certified:
        certified = True
    model = broken_model(certified=certified)
    prompts = make(model)
    logs, ranks = slow(model._module, model.tokenizer, prompts)
    assert torch.equal(logs.isnan().any(-1), BROKEN)
    with pytest.warns(MissingScoresWarning, match="2 of 5 prompts have no score") as caught:
        results = run_prompts(model, prompts, batch_size=2, get_probs_func=function, tqdm=None)
    assert caught[-1].filename == __file__

    def last(values):
        return values if values.dim() == 1 else values[:, -1]

    assert torch.equal(last(results.missing), BROKEN)
    own = torch.stack([last(results[name]) for name in TARGETS], dim=-1)
    assert torch.equal(own.isnan().any(-1), BROKEN)
    assert (own - logs.exp())[~BROKEN].abs().max() < 1e-5
    better = (logs[:, 0] > logs[:, 1])[~BROKEN]
    for name, right in (("target", better), ("other", ~better)):
        expected = torch.where(right, 1, 2)
        assert torch.equal(last(results.ranks(name))[~BROKEN], expected)
        assert (last(results.ranks(name))[BROKEN] == 0).all()
        with pytest.warns(MissingScoresWarning, match="2 of 5 prompts.* leaves them out") as caught:
            share = torch.as_tensor(results.accuracy(name))
        assert caught[-1].filename == __file__
        assert share.flatten()[-1].item() == pytest.approx(right.float().mean().item())
    difference = last(results.logit_difference("target", "other"))
    assert torch.equal(difference.isnan(), BROKEN)
    assert (difference - (logs[:, 0] - logs[:, 1]))[~BROKEN].abs().max() < 1e-4
    if function is None:
        assert torch.equal(results.vocabulary_ranks, ranks)
        for i, name in enumerate(TARGETS):
            with pytest.warns(MissingScoresWarning):
                share = results.accuracy(name, "vocabulary")
            assert share == pytest.approx((ranks[~BROKEN, i] == 1).float().mean().item())
    assert "2 of them without a score" in repr(results)
    assert "nan" not in repr(results)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_whole_answers(function, normalize):
    model = broken_model()
    options = {"scoring": "sequence", "normalize_length": normalize, "get_probs_func": function, "tqdm": None}
    with pytest.warns(MissingScoresWarning, match="2 of 5"):
        results = run_prompts(model, make(model), **options)
    good = [prompt for prompt, broken in zip(make(model), BROKEN, strict=True) if not broken]
    alone = run_prompts(model, good, **options)
    for name in TARGETS:
        assert results[name][BROKEN].isnan().flatten(1 if results.num_layers else 0).any(-1).all()
        assert (results[name][~BROKEN] - alone[name]).abs().max() < 1e-5


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_model_that_is_broken_altogether(function):
    model = StandardizedTransformer(tiny_model("llama"), tokenizer=tiny_tokenizer())
    with torch.no_grad():
        model._module.model.layers[1].mlp.down_proj.weight.fill_(torch.nan)
    with pytest.warns(MissingScoresWarning, match="5 of 5 prompts have no score"):
        results = run_prompts(model, make(model), get_probs_func=function, tqdm=None)
    for name in TARGETS:
        with pytest.warns(MissingScoresWarning):
            share = torch.as_tensor(results.accuracy(name)).flatten()
        assert share[-1].isnan()
        assert results[name].view(5, -1)[:, -1].isnan().all()
        assert (results.ranks(name).view(5, -1)[:, -1] == 0).all()
    if function is logit_lens:
        assert not results["target"][:, 0].isnan().any(), "the layer before is as it was"
        assert torch.as_tensor(results.accuracy("target"))[0].isfinite()
    else:
        assert "'target': –" in repr(results)
    if function is None:
        with pytest.warns(MissingScoresWarning):
            assert math.isnan(results.accuracy("target", "vocabulary"))
    frame = results.to_dataframe()
    assert frame.probability.isna().sum() >= 10


def with_bias(value):
    """A Phi whose head adds `value` to the logit of token 11."""
    module = tiny_model("phi")
    model = StandardizedTransformer(module, tokenizer=tiny_tokenizer())
    with torch.no_grad():
        module.lm_head.bias[11] = value
    return model


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_one_infinite_logit_spoils_the_distribution(value):
    model = with_bias(value)
    prompts = [Prompt("The", {"hit": [11], "beside": [12], "with it": [11, 12]})]
    with pytest.warns(MissingScoresWarning, match="1 of 1 prompts"):
        results = run_prompts(model, prompts, tqdm=None)
    assert all(values.isnan().all() for values in results.values())
    assert results.vocabulary_ranks.tolist() == [[0, 0, 0]]
    with pytest.warns(MissingScoresWarning, match="1 of 1"):
        assert next_token_probs(model, "The", targets=[[[11], [12]]]).isnan().all()
    with pytest.warns(MissingScoresWarning, match="1 of 1"):
        assert next_token_probs(model, "The").isnan().all()
    for function in (next_token_probs, next_token_probs_unsqueeze):
        with pytest.warns(MissingScoresWarning, match="1 of 1"):
            assert all(values.isnan().all() for values in prompts[0].run(model, function).values())


def test_an_impossible_token_is_no_fault():
    """A logit of -infinity is a probability of 0, as HuggingFace's own softmax has it."""
    model = with_bias(-math.inf)
    prompts = [Prompt(text, {"hit": [11], "beside": [12], "with it": [11, 12]}) for text in TEXTS]
    logs, _ = slow_probs(model, prompts)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for function in FUNCTIONS:
            results = run_prompts(model, prompts, get_probs_func=function, tqdm=None)
            for i, name in enumerate(results):
                assert (results[name].view(5, -1)[:, -1] - logs[:, i]).abs().max() < 1e-6
            assert torch.as_tensor(results.accuracy("hit")).flatten()[-1] == 0
            assert not results.missing.any()


@torch.no_grad()
def slow_probs(model, prompts):
    found = []
    for prompt in prompts:
        probs = model._module(**model.tokenizer(prompt.prompt, return_tensors="pt")).logits[0, -1].softmax(-1)
        found.append([sum(probs[t] for t in tokens) for tokens in prompt.target_tokens.values()])
    return torch.tensor(found), None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [3, 20])
def test_one_broken_value_of_a_function(tiny, value, at):
    """At a target or anywhere else in the vocabulary, of one prompt in one layer."""
    model = tiny("gpt2")
    prompts = [Prompt(text, {"a": [20], "b": [30]}) for text in TEXTS]

    def function(model, prompts, remote=False):
        probs = next_token_probs(model, prompts).unsqueeze(1).repeat(1, 3, 1)
        probs[[i for i, text in enumerate(prompts) if text == "One"], 1, at] = value
        return probs

    with pytest.warns(MissingScoresWarning, match=r"1 of 5 prompts have no score in at least one layer"):
        results = run_prompts(model, prompts, get_probs_func=function, batch_size=2, tqdm=None)
    wanted = torch.zeros(5, 3, dtype=torch.bool)
    wanted[2, 1] = True
    assert torch.equal(results.missing, wanted)
    own = run_prompts(model, prompts, tqdm=None)
    for name in ("a", "b"):
        assert torch.equal(results[name].isnan(), wanted)
        assert (results[name] - own[name][:, None])[~wanted].abs().max() < 1e-6
        assert torch.equal(results.ranks(name) == 0, wanted)
    right = own["a"] > own["b"]
    with pytest.warns(MissingScoresWarning, match="1 of 5"):
        shares = results.accuracy("a")
    keep = torch.tensor([True, True, False, True, True])
    assert torch.allclose(shares, torch.stack([right.float().mean(), right[keep].float().mean(), right.float().mean()]))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_one_broken_target_of_a_function_that_reduces(tiny, value):
    model = tiny("gpt2")
    prompts = [Prompt(text, {"a": [20], "b": [30]}) for text in TEXTS]

    def function(model, prompts, remote=False, targets=None):
        probs = next_token_probs(model, prompts, targets=targets)
        probs[0, 1] = value
        return probs

    function.reduces_targets = True
    with pytest.warns(MissingScoresWarning, match="5 of 5"):
        results = run_prompts(model, prompts, get_probs_func=function, batch_size=1, tqdm=None)
    assert results["b"].isnan().all()
    assert (results["a"] - run_prompts(model, prompts, tqdm=None)["a"]).abs().max() < 1e-6
    assert results.ranks("a").tolist() == [0] * 5, "it is not known what it would be compared with"
    with pytest.warns(MissingScoresWarning):
        assert math.isnan(results.accuracy("a"))
    with pytest.warns(MissingScoresWarning):
        assert prompts[0].run(model, function)["b"].isnan().all()


def test_missing_and_not_run_are_told_apart(tiny, tmp_path):
    model = broken_model()
    prompts = make(model)

    def fails(model, some, remote=False):
        if "One" in some:
            raise ValueError("no")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MissingScoresWarning)
            return next_token_probs(model, some)

    with pytest.raises(RuntimeError) as info:
        run_prompts(model, prompts, 1, fails, tqdm=None)
    partial = info.value.partial
    partial.save(tmp_path)
    for results in (partial, PromptResults.load(tmp_path)):
        ran = results.done
        assert not ran.all()
        assert torch.equal(results.missing, BROKEN & ran)
        assert (results.ranks("target") > 0).tolist() == (ran & ~BROKEN).tolist()
        with pytest.warns(MissingScoresWarning, match=f"2 of {int(ran.sum())} prompts"):
            results.accuracy("target")


def test_sound_models_give_no_warning(tiny):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for function in FUNCTIONS:
            results = run_prompts(tiny("gpt2"), make(tiny("gpt2")), get_probs_func=function, tqdm=None)
            results.accuracy("target")
            assert not results.missing.any()
            assert "without a score" not in repr(results)
