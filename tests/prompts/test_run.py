"""`run_prompts` against a loop over single prompts through HuggingFace's own forward."""

import time

import pytest
import torch

from nnterp.errors import InsideTraceError
from nnterp.prompts import (
    CollisionError,
    IncompleteRunError,
    Prompt,
    PromptResults,
    next_token_probs,
    next_token_probs_unsqueeze,
    run_prompts,
)
from nnterp.testing import tiny_model

TEXTS = [
    "The capital of France is",
    "The",
    "When Mary and John went to the store, John gave a drink to",
    "The Eiffel Tower is in the city of",
    "What is the opposite of hot? The opposite",
    "Paris, Rome and",
    "One",
]
TARGETS = {"target": "Paris", "other": ["London", "Madrid"]}
ARCHITECTURES = [
    "gpt2", "llama", "gemma2", "gemma3_text", "mistral", "qwen3", "bloom", "opt", "gpt_neox", "falcon",
    "mpt", "phi", "cohere", "granite", "mixtral", "olmo2", "stablelm", "gptj", "mamba", "rwkv", 
    "recurrent_gemma", "jamba",
]  # fmt: skip


def make(tokenizer, texts=TEXTS, targets=TARGETS):
    return [Prompt.from_strings(text, targets, tokenizer) for text in texts]


@torch.no_grad()
def slow(model, prompts, tokenizer):
    """Through a HuggingFace model of its own, one prompt at a time."""
    found = {name: [] for name in prompts[0].target_tokens}
    for prompt in prompts:
        inputs = {"input_ids": torch.tensor([tokenizer(prompt.prompt)["input_ids"]])}
        probs = model(**inputs).logits[0, -1].float().softmax(-1)
        for name, tokens in prompt.target_tokens.items():
            found[name].append(sum(probs[token] for token in tokens))
    return {name: torch.stack(values) for name, values in found.items()}


def close(found, wanted, tolerance=1e-5):
    assert set(found) == set(wanted)
    for name in wanted:
        assert found[name].shape == wanted[name].shape
        assert (found[name] - wanted[name]).abs().max() < tolerance, name


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_architectures(model_type, tiny, lens):
    model = tiny(model_type)
    prompts = make(model.tokenizer)
    results = run_prompts(model, prompts, batch_size=3, tqdm=None)
    wanted = slow(tiny_model(model_type), prompts, model.tokenizer)
    close(results, wanted)
    assert all(values.dtype == torch.float32 and values.device.type == "cpu" for values in results.values())
    layered = run_prompts(model, prompts, batch_size=3, get_probs_func=lens, tqdm=None)
    assert layered["target"].shape == (len(prompts), model.num_layers)
    close({name: values[:, -1] for name, values in layered.items()}, wanted)
    alone = [run_prompts(model, [prompt], get_probs_func=lens, tqdm=None)["target"] for prompt in prompts]
    close({"target": layered["target"]}, {"target": torch.cat(alone)})


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_tokenizers(model_type, tokenizer_kind, model_with, tokenizer_of_kind, lens):
    model, tokenizer = model_with(model_type, tokenizer_kind), tokenizer_of_kind(tokenizer_kind)
    prompts = make(tokenizer)
    wanted = slow(tiny_model(model_type), prompts, tokenizer)
    close(run_prompts(model, prompts, batch_size=4, tqdm=None), wanted)
    layered = run_prompts(model, prompts, batch_size=4, get_probs_func=lens, tqdm=None)
    close({name: values[:, -1] for name, values in layered.items()}, wanted)


def test_any_batch_size_gives_the_same_in_order(tiny):
    model = tiny("llama")
    prompts = make(model.tokenizer)
    whole = run_prompts(model, prompts, batch_size=100, tqdm=None)
    for size in (1, 2, 3):
        close(run_prompts(model, prompts, batch_size=size, tqdm=None), whole)
    backwards = run_prompts(model, prompts[::-1], batch_size=3, tqdm=None)
    close({name: values.flip(0) for name, values in backwards.items()}, whole)


def test_right_padding(tiny, model_with):
    from nnterp import StandardizedTransformer
    from nnterp.testing import tiny_tokenizer

    model = StandardizedTransformer(tiny_model("llama"), tokenizer=tiny_tokenizer())
    model.tokenizer.padding_side = "right"
    prompts = make(model.tokenizer)
    close(run_prompts(model, prompts, tqdm=None), slow(tiny_model("llama"), prompts, model.tokenizer))


def test_without_a_certificate_the_models_own_head_decides():
    from nnterp import StandardizedTransformer
    from nnterp.testing import tiny_tokenizer

    model = StandardizedTransformer(tiny_model("gemma2"), tokenizer=tiny_tokenizer(), check_renaming=False)
    prompts = make(model.tokenizer)
    close(run_prompts(model, prompts, tqdm=None), slow(tiny_model("gemma2"), prompts, model.tokenizer))


@pytest.mark.parametrize("model_type", ["gpt2", "gemma2"])
def test_the_vocabulary_is_projected_for_last_tokens_alone(model_type):
    """The model's head sees one row per prompt, never `[batch, seq]`."""
    from nnterp import StandardizedTransformer
    from nnterp.testing import tiny_tokenizer

    module = tiny_model(model_type)
    model = StandardizedTransformer(module, tokenizer=tiny_tokenizer())
    seen = []
    handle = module.get_output_embeddings().register_forward_hook(lambda m, i, out: seen.append(out.shape[:-1].numel()))
    run_prompts(model, make(model.tokenizer), batch_size=100, tqdm=None)
    handle.remove()
    assert seen == [len(TEXTS)]


def test_custom_functions(tiny, lens, whole_lens):
    model = tiny("gpt2")
    prompts = make(model.tokenizer)
    own = run_prompts(model, prompts, batch_size=3, tqdm=None)
    flat = run_prompts(model, prompts, get_probs_func=lambda m, p, **_: next_token_probs(m, p), tqdm=None)
    close(flat, own)
    axis = run_prompts(model, prompts, get_probs_func=next_token_probs_unsqueeze, tqdm=None)
    close({name: values[:, 0] for name, values in axis.items()}, own)
    close(run_prompts(model, prompts, get_probs_func=next_token_probs, tqdm=None), own)
    layered = run_prompts(model, prompts, batch_size=3, get_probs_func=whole_lens, tqdm=None)
    close(layered, run_prompts(model, prompts, batch_size=3, get_probs_func=lens, tqdm=None))
    close(layered, {name: torch.stack([p.run(model, whole_lens)[name][0] for p in prompts]) for name in own})
    close(layered, {name: torch.stack([p.run(model, lens)[name][0] for p in prompts]) for name in own})


def test_a_function_is_called_as_in_1x(tiny):
    model, calls = tiny("gpt2"), []

    def uniform(nn_model, prompts, remote=False, scale=None):
        calls.append((nn_model, prompts, remote, scale))
        return torch.full((len(prompts), 2, model.vocab_size), scale)

    prompts = make(model.tokenizer)
    each = 1 / model.vocab_size
    results = run_prompts(model, prompts, 4, uniform, {"scale": each}, tqdm=None)
    assert sorted(text for call in calls for text in call[1]) == sorted(TEXTS)
    assert all(call[0] is model and call[2] is False and call[3] == each for call in calls)
    close(results, {name: torch.full((len(TEXTS), 2), each * len(t)) for name, t in prompts[0].target_tokens.items()})


def test_a_partial_of_a_reducing_function_reduces(tiny, lens):
    from functools import partial

    model = tiny("gpt2")
    prompts = make(model.tokenizer)
    close(
        run_prompts(model, prompts, get_probs_func=partial(lens), tqdm=None),
        run_prompts(model, prompts, get_probs_func=lens, tqdm=None),
    )


def test_target_probs_of_given_distributions():
    probs = torch.rand(3, 5, 20)
    prompt = Prompt("x", {"a": [1, 4, 4], "b": [7]})
    found = prompt.get_target_probs(probs)
    assert torch.allclose(found["a"], probs[..., 1] + probs[..., 4]), "a token counts once"
    assert torch.equal(found["b"], probs[..., 7])
    assert torch.equal(prompt.get_target_probs(probs, layer=2)["b"], probs[:, 2, 7])
    assert torch.equal(prompt.get_target_probs(probs[:, 0])["b"], probs[:, 0, 7])
    with pytest.raises(ValueError, match="vocabulary of 5"):
        prompt.get_target_probs(probs[..., :5])
    with pytest.raises(ValueError, match="no axis of layers"):
        prompt.get_target_probs(probs[:, 0], layer=1)
    with pytest.raises(ValueError, match="was expected"):
        prompt.get_target_probs(probs[0, 0])


def test_token_ids_and_chats_are_prompts(tokenizer_of_kind, model_with):
    tokenizer, model = tokenizer_of_kind("chat"), model_with("llama", "chat")
    ids = tokenizer(TEXTS[0])["input_ids"]
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    begun = [*chat, {"role": "assistant", "content": "It is"}]
    prompts = [Prompt.from_strings(p, TARGETS, tokenizer) for p in (ids, chat, begun, TEXTS[0])]
    results = run_prompts(model, prompts, tqdm=None)
    texts = [
        "<|user|>\nWhat is the capital of France?<|end|>\n<|assistant|>\n",
        "<|user|>\nWhat is the capital of France?<|end|>\n<|assistant|>\nIt is",
    ]
    plain = [Prompt.from_strings(text, TARGETS, tokenizer) for text in [TEXTS[0], *texts, TEXTS[0]]]
    close(results, slow(tiny_model("llama"), plain, tokenizer))
    assert results.texts == [TEXTS[0], *texts, TEXTS[0]]
    seen = []

    def custom(model, prompts, remote):
        seen.extend(prompts)
        return next_token_probs(model, prompts)

    close(run_prompts(model, prompts, get_probs_func=custom, tqdm=None), results)
    assert all(isinstance(i, int) for prompt in seen for i in prompt), (
        "templated texts must not get special tokens twice"
    )


# -- errors, before anything runs --------------------------------------------------------------------------------------


@pytest.fixture
def forbidden(tiny):
    """A model that must not run."""
    model = tiny("gpt2")

    def stop(*args, **kwargs):
        raise AssertionError("the model ran")

    handle = model._module.register_forward_pre_hook(stop)
    yield model
    handle.remove()


def refused(model, prompts, match, error=ValueError, **kwargs):
    with pytest.raises(error, match=match) as info:
        run_prompts(model, prompts, tqdm=None, **kwargs)
    assert not isinstance(info.value, IncompleteRunError)


@pytest.mark.parametrize("function", [None, next_token_probs, next_token_probs_unsqueeze])
def test_bad_input_is_refused_before_anything_runs(forbidden, function):
    model, tokenizer = forbidden, forbidden.tokenizer
    good = make(tokenizer, TEXTS[:2])
    ways = {"get_probs_func": function}
    other = Prompt.from_strings("x", {"target": "Paris", "more": "Rome"}, tokenizer)
    refused(model, [*good, other], r"same target keys.*'more'", **ways)
    refused(model, [*good, Prompt("x", {"target": [3], "other": []})], "'other' has no tokens", **ways)
    refused(model, [*good, Prompt("x", {})], "same target keys", **ways)
    refused(model, [Prompt("x", {})], "no targets", **ways)
    refused(model, [*good, Prompt("", good[0].target_tokens)], "no tokens", **ways)
    limit = model._module.config.n_positions
    refused(model, [*good, Prompt("a b " * limit, good[0].target_tokens)], f"at most {limit}", **ways)
    refused(model, [*good, Prompt("x", {"target": [3], "other": [model.vocab_size]})], "vocabulary of 509", **ways)
    refused(model, [Prompt("x", {"a": [3, 4], "b": [4]})], "'a', 'b' share", CollisionError, distinct=True, **ways)
    refused(model, ["a text"], "Prompt.from_strings", TypeError, **ways)
    refused(model, good, "batch_size", batch_size=0, **ways)
    refused(model, good, "scoring='last'", scoring="last", **ways)
    refused(model, good, "normalize_length", normalize_length=True, **ways)
    with pytest.raises(IncompleteRunError, match="the model ran"):
        run_prompts(model, good, tqdm=None, **ways)


def test_bad_calls(tiny):
    model = tiny("gpt2")
    prompts = make(model.tokenizer, TEXTS[:1])
    refused(model, prompts, "none was given", func_kwargs={"layer": 1})
    refused(model, prompts, "must be a function", TypeError, get_probs_func=3)
    refused(model._module, prompts, "StandardizedTransformer", TypeError)
    with pytest.raises(TypeError, match="None for no bar"):
        run_prompts(model, prompts, tqdm=False)
    with pytest.raises(InsideTraceError, match="run_prompts"), model.trace("x"):
        run_prompts(model, prompts, tqdm=None)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda m, p, remote: torch.ones(len(p) + 1, 509),
        lambda m, p, remote: torch.ones(len(p)),
        lambda m, p, remote: None,
    ],
)
def test_a_function_that_returns_something_else(tiny, wrong):
    model = tiny("gpt2")
    with pytest.raises(IncompleteRunError, match="was expected"):
        run_prompts(model, make(model.tokenizer), get_probs_func=wrong, tqdm=None)


# -- runs that break off -----------------------------------------------------------------------------------------------


class Failing:
    """A lens that fails at its nth call."""

    reduces_targets = True

    def __init__(self, lens, at, error):
        self.lens, self.at, self.error, self.calls, self.rows = lens, at, error, 0, 0

    def __call__(self, model, prompts, remote=False, targets=None):
        self.calls += 1
        if self.calls == self.at:
            raise self.error
        self.rows += len(prompts)
        return self.lens(model, prompts, remote, targets)


@pytest.mark.parametrize("scoring", ["first_token", "sequence"])
def test_a_failed_batch_loses_nothing(tiny, lens, scoring, tmp_path):
    model = tiny("gpt2")
    prompts = make(model.tokenizer)
    options = {"batch_size": 2, "scoring": scoring, "tqdm": None}
    whole = run_prompts(model, prompts, get_probs_func=Failing(lens, -1, None), **options)
    with pytest.raises(
        IncompleteRunError, match=r"Batch 3 of \d+ failed after \d+ of 7 prompts \(MemoryError: full\)"
    ) as info:
        run_prompts(model, prompts, get_probs_func=Failing(lens, 3, MemoryError("full")), **options)
    partial = info.value.partial
    assert isinstance(info.value.__cause__, MemoryError)
    assert isinstance(partial, PromptResults)
    assert not partial.complete
    if scoring == "first_token":
        assert int(partial.done.sum()) == 4
    for name in whole:
        if partial.done.any():
            assert torch.equal(partial[name][partial.done], whole[name][partial.done])
        assert partial[name][~partial.done].isnan().all()
    partial.save(tmp_path / "partial")
    counted = Failing(lens, -1, None)
    run_prompts(model, prompts, get_probs_func=counted, **options)
    for source in (partial, tmp_path / "partial"):
        rest = Failing(lens, -1, None)
        resumed = run_prompts(model, prompts, get_probs_func=rest, resume=source, **options)
        assert resumed.complete
        close(resumed, whole)
        assert rest.rows == counted.rows - 4, "what is there is not computed again"


def test_an_interrupt_stays_one(tiny, lens):
    model = tiny("gpt2")
    prompts = make(model.tokenizer)
    with pytest.raises(KeyboardInterrupt) as info:
        run_prompts(model, prompts, 2, Failing(lens, 3, KeyboardInterrupt()), tqdm=None)
    assert int(info.value.partial.done.sum()) == 4
    assert "4 of 7 prompts" in info.value.__notes__[0]


def test_checkpoint(tiny, lens, tmp_path):
    model = tiny("gpt2")
    prompts = make(model.tokenizer)
    with pytest.raises(IncompleteRunError, match="run1"):
        run_prompts(model, prompts, 2, Failing(lens, 3, ValueError("no")), checkpoint=tmp_path / "run1", tqdm=None)
    rest = Failing(lens, -1, None)
    results = run_prompts(model, prompts, 2, rest, checkpoint=tmp_path / "run1", tqdm=None)
    assert rest.rows == 3
    assert results.complete
    again = Failing(lens, 1, AssertionError("ran"))
    close(run_prompts(model, prompts, 2, again, checkpoint=tmp_path / "run1", tqdm=None), results)
    assert again.calls == 0
    assert sorted(path.name for path in (tmp_path / "run1").iterdir()) == ["run.json", "scores.safetensors"]


def test_another_run_is_not_resumed(tiny, lens):
    model = tiny("gpt2")
    prompts = make(model.tokenizer)
    done = run_prompts(model, prompts, tqdm=None)
    refused(model, prompts, "get_probs_func=None", resume=done, get_probs_func=lens)
    refused(model, prompts, "scoring='first_token'", resume=done, scoring="sequence")
    refused(model, prompts[:-1], "7 prompts", resume=done)
    refused(model, prompts[::-1], "prompt 0", resume=done)
    changed = [*prompts[:-1], Prompt(TEXTS[-1], {"target": [5], "other": [6]})]
    refused(model, changed, "prompt 6", resume=done)
    refused(tiny("llama"), prompts, "model_class", resume=done)
    refused(model, prompts, "holds no results", FileNotFoundError, resume="/nonexistent")


# -- the rest ----------------------------------------------------------------------------------------------------------


def test_the_bar(tiny, capsys):
    model, bars = tiny("gpt2"), []
    prompts = make(model.tokenizer)

    def bar(items, desc):
        bars.append((len(list(items)), desc))
        return items

    run_prompts(model, prompts, batch_size=2, tqdm=bar)
    assert bars == [(4, "Running prompts")]
    run_prompts(model, prompts, tqdm=None)
    assert "Running" not in capsys.readouterr().err
    run_prompts(model, prompts, progress=True)
    assert "Running prompts" in capsys.readouterr().err


def test_progress_in_either_spelling(tiny, capsys, monkeypatch):
    model, seen = tiny("gpt2"), []
    prompts = make(model.tokenizer)

    def bar(items, desc):
        seen.append(desc)
        return items

    def shown(**options):
        seen.clear()
        close(run_prompts(model, prompts, batch_size=2, **options), whole)
        return "Running prompts" in capsys.readouterr().err, len(seen)

    whole = run_prompts(model, prompts, progress=False)
    assert "Running" not in capsys.readouterr().err
    assert shown(progress=True) == (True, 0)
    assert shown(progress=False) == shown(tqdm=None) == shown(tqdm=None, progress=True) == (False, 0)
    assert shown() == shown(progress=None) == (False, 0), "it takes less than two seconds"
    assert shown(tqdm=bar) == shown(tqdm=bar, progress=True) == shown(tqdm=bar, progress=None) == (False, 1)
    assert shown(tqdm=bar, progress=False) == (False, 0)

    def slow(model, some, remote=False):
        time.sleep(0.8)
        return next_token_probs(model, some)

    assert shown(progress=None, get_probs_func=slow) == (True, 0)
    with pytest.raises(TypeError, match="progress must be"):
        run_prompts(model, prompts, progress="yes")


@pytest.mark.parametrize("scoring", ["first_token", "sequence"])
@pytest.mark.parametrize("function", [None, next_token_probs])
def test_no_prompts(forbidden, tmp_path, scoring, function):
    """As in 1.x: a loop over nothing."""
    from nnterp import prompt_utils

    options = {"scoring": scoring, "get_probs_func": function}
    results = run_prompts(forbidden, [], **options)
    assert results == {}
    assert isinstance(results, PromptResults)
    assert results.complete
    assert repr(results) == "<PromptResults: 0 of 0 prompts>"
    assert len(results.to_dataframe()) == 0
    assert run_prompts(forbidden, iter(()), checkpoint=tmp_path, **options) == {}
    assert run_prompts(forbidden, [], resume=tmp_path, checkpoint=tmp_path, **options) == {}
    assert PromptResults.load(tmp_path) == {}
    assert prompt_utils.run_prompts(forbidden, [], get_probs_func=function) == {}
    with pytest.raises(ValueError, match="No prompt was run"):
        results.accuracy()
    refused(forbidden, [], "scoring='last'", scoring="last")
    refused(forbidden, [Prompt("x", {"a": [3]}, {"a": "b"})], "0 prompts", resume=results, **options)


def test_a_function_shows_no_bar_of_its_own(tiny, lens):
    model, seen = tiny("gpt2"), []

    def bar_by_default(model, prompts, remote=False, targets=None, progress=None):
        seen.append(progress)
        return lens(model, prompts, remote, targets)

    bar_by_default.reduces_targets = True
    prompts = make(model.tokenizer)
    run_prompts(model, prompts, get_probs_func=bar_by_default, tqdm=None)
    run_prompts(model, prompts, get_probs_func=bar_by_default, func_kwargs={"progress": True}, tqdm=None)
    assert seen == [False, True]


def test_next_token_probs(tiny):
    model = tiny("gemma2")
    probs = next_token_probs(model, TEXTS)
    with torch.no_grad():
        alone = [
            tiny_model("gemma2")(**model.tokenizer(t, return_tensors="pt")).logits[0, -1].softmax(-1) for t in TEXTS
        ]
    assert probs.shape == (len(TEXTS), model.vocab_size)
    assert (probs - torch.stack(alone)).abs().max() < 1e-5
    some = next_token_probs(model, TEXTS[:2], targets=[[[3], [4, 5]], [[6, 7, 7], [8]]])
    assert torch.allclose(some, torch.stack([probs[0, [3]], probs[1, [8]]]).new_tensor(
        [[probs[0, 3], probs[0, 4] + probs[0, 5]], [probs[1, 6] + probs[1, 7], probs[1, 8]]]
    ), atol=1e-6)  # fmt: skip
    assert torch.equal(next_token_probs_unsqueeze(model, TEXTS[0])[:, 0], next_token_probs(model, TEXTS[0]))
    with pytest.raises(ValueError, match="3 entries for 2 prompts"):
        next_token_probs(model, TEXTS[:2], targets=[[[1]]] * 3)


def test_1x_names(tiny):
    from nnterp import prompt_utils

    model = tiny("gpt2")
    prompts = [
        prompt_utils.Prompt.from_strings(prompt=t, target_strings=TARGETS, tokenizer=model.tokenizer) for t in TEXTS
    ]
    results = prompt_utils.run_prompts(nn_model=model, prompts=prompts, batch_size=3, tqdm=None)
    close(results, run_prompts(model, prompts, tqdm=None))
    tokens = prompt_utils.get_first_tokens("Paris", llm_or_tokenizer=model.tokenizer)
    assert tokens == prompts[0].target_tokens["target"]
    assert set(prompt_utils.__all__) >= {"Prompt", "run_prompts", "get_first_tokens", "TokenizationError"}
    assert issubclass(prompt_utils.TokenizationError, Exception)
