"""Token ids of targets: what is refused, and that an id given twice counts once, against plain loops."""

from functools import partial

import numpy as np
import pytest
import torch

from nnterp.interventions import logit_lens
from nnterp.prompts import (
    IncompleteRunError,
    Prompt,
    get_first_tokens,
    next_token_probs,
    next_token_probs_unsqueeze,
    run_prompts,
)
from nnterp.testing import tiny_model

TEXTS = ["The capital of France is", "The"]
NO_IDS = [
    b"Hello",
    bytearray(b"Hello"),
    "Paris",
    {3: 4},
    3,
    None,
    3.7,
    [3.7],
    [3.0],
    ["3"],
    [None],
    [b"a"],
    [True],
    [False, 3],
    [[3]],
    torch.tensor([1.7, 2.9]),
    torch.tensor([True, False]),
    torch.tensor([[3, 4]]),
    torch.tensor(3),
    [torch.tensor(1.7)],
    [torch.tensor(True)],
    [torch.tensor([3])],
    np.array([1.5]),
    np.array([True]),
]


def shown(value):
    return f"{type(value).__name__} {value}"


@pytest.fixture
def idle(tiny):
    """A model that must not run."""
    model = tiny("gpt2")
    handle = model._module.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    yield model
    handle.remove()


def slow(text, tokens, tokenizer):
    """The probability of a set of tokens after a text, from HuggingFace's own forward."""
    with torch.no_grad():
        probs = tiny_model("gpt2")(**tokenizer(text, return_tensors="pt")).logits[0, -1].softmax(-1)
    return sum(probs[token] for token in set(tokens))


@pytest.mark.parametrize("wrong", NO_IDS, ids=shown)
def test_what_is_no_list_of_integers_is_refused(idle, wrong):
    with pytest.raises(TypeError, match=r"The target 'a' (is|holds)"):
        Prompt("x", {"a": wrong})
    changed = Prompt("x", {"a": [3]})
    changed.target_tokens["a"] = wrong
    for ask in (
        lambda: run_prompts(idle, [changed], tqdm=None),
        lambda: run_prompts(idle, [changed], tqdm=None, get_probs_func=next_token_probs_unsqueeze),
        lambda: changed.run(idle, next_token_probs),
        lambda: changed.get_target_probs(torch.rand(1, 509)),
        lambda: next_token_probs(idle, "x", targets=[[[4], wrong]]),
    ):
        with pytest.raises(TypeError, match=r"(?i)target"):
            ask()


@pytest.mark.parametrize("wrong", [[-1], [3, -1], torch.tensor([-1]), np.array([-5])], ids=shown)
def test_negative_ids_are_refused(idle, wrong):
    with pytest.raises(ValueError, match=r"-\d is no token id"):
        Prompt("x", {"a": wrong})
    with pytest.raises(ValueError, match=r"-\d is no token id"):
        next_token_probs(idle, "x", targets=[[wrong]])


def test_ids_beyond_the_vocabulary_are_refused(idle):
    prompt = Prompt("x", {"a": [3], "b": [idle.vocab_size]})
    for ask in (
        lambda: run_prompts(idle, [prompt], tqdm=None),
        lambda: run_prompts(idle, [prompt], tqdm=None, get_probs_func=logit_lens),
        lambda: prompt.run(idle, next_token_probs),
        lambda: next_token_probs(idle, "x", targets=[list(prompt.target_tokens.values())]),
        lambda: prompt.get_target_probs(torch.rand(1, idle.vocab_size)),
    ):
        with pytest.raises(ValueError, match=r"509\] are not all in a vocabulary of 509"):
            ask()


def test_targets_that_fit_no_prompt_are_refused(idle):
    for wrong, error, match in (
        (3, TypeError, "one list for each prompt"),
        ("ab", TypeError, "one list for each prompt"),
        ([[[3]]], ValueError, "1 entries for 2 prompts"),
        ([[[3]], [[4], [5]]], ValueError, "prompt 1 has 2"),
        ([[[3], [4], [5]], [[6]]], ValueError, "prompt 1 has 1"),  # 4 in all: a reshape would go through
        ([[[3]], []], ValueError, "prompt 1 are empty"),
        ([[[3]], [[]]], ValueError, "prompt 1 are empty"),
        ([[[3]], 4], TypeError, "prompt 1 are 4"),
    ):
        with pytest.raises(error, match=match):
            next_token_probs(idle, TEXTS, targets=wrong)
    with pytest.raises(TypeError, match="give a dict"):
        Prompt("x", [3])


@pytest.mark.parametrize("words", [b"Paris", 3, None, {"Paris": 1}, [b"Paris"], [3], [None]], ids=shown)
def test_words_are_texts(tokenizer_of_kind, words):
    tokenizer = tokenizer_of_kind("byte_level")
    for ask in (
        lambda: get_first_tokens(words, tokenizer),
        lambda: Prompt.from_strings("x", {"a": words}, tokenizer),
    ):
        with pytest.raises(TypeError, match="text"):
            ask()


KINDS = {
    "list": list,
    "tuple": tuple,
    "set": set,
    "range": range,
    "iterator": iter,
    "tensor": torch.tensor,
    "array": np.array,
    "bytes in an array": partial(np.array, dtype=np.uint8),
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_kinds_of_integers(tiny, kind):
    model = tiny("gpt2")
    ids = range(20, 23) if kind is range else kind([20, 21, 22])
    prompt = Prompt(TEXTS[0], {"a": ids, "b": [torch.tensor(30), np.int64(31)]})
    assert prompt.target_tokens == {"a": [20, 21, 22], "b": [30, 31]}
    assert all(type(token) is int for tokens in prompt.target_tokens.values() for token in tokens)
    found = run_prompts(model, [prompt], tqdm=None)
    assert abs(found["a"].item() - slow(TEXTS[0], [20, 21, 22], model.tokenizer)) < 1e-6


@pytest.mark.parametrize("twice", [[7, 7], [7, 8, 7, 8], torch.tensor([7, 7]), [torch.tensor(7), 7], np.array([7, 7])])
@pytest.mark.parametrize("function", [None, next_token_probs, next_token_probs_unsqueeze, logit_lens])
def test_an_id_given_twice_counts_once(tiny, twice, function):
    model = tiny("gpt2")
    ids = [int(token) for token in twice]
    wanted = torch.tensor([[slow(text, own, model.tokenizer) for own in (ids, [9])] for text in TEXTS])
    prompts = [Prompt(text, {"a": twice, "b": [9]}) for text in TEXTS]
    results = run_prompts(model, prompts, get_probs_func=function, tqdm=None)
    for i, name in enumerate(("a", "b")):
        assert (results[name].view(2, -1)[:, -1] - wanted[:, i]).abs().max() < 1e-6
    if function is not None:
        alone = prompts[0].run(model, function)
        assert abs(alone["a"].flatten()[-1] - wanted[0, 0]) < 1e-6
    found = next_token_probs(model, TEXTS, targets=[[twice, [9]]] * 2)
    assert (found - wanted).abs().max() < 1e-6
    whole = next_token_probs(model, TEXTS)
    assert (prompts[0].get_target_probs(whole)["a"] - wanted[:, 0]).abs().max() < 1e-6


def test_targets_as_one_tensor(tiny):
    model = tiny("gpt2")
    targets = torch.tensor([[[7, 7], [8, 9]], [[10, 11], [12, 12]]])
    wanted = [
        [slow(text, own.tolist(), model.tokenizer) for own in row] for text, row in zip(TEXTS, targets, strict=True)
    ]
    assert (next_token_probs(model, TEXTS, targets=targets) - torch.tensor(wanted)).abs().max() < 1e-6


def test_answers_given_twice_count_once(tiny):
    model = tiny("gpt2")
    once = Prompt.from_strings(TEXTS[0], {"a": ["Paris", "Rome"]}, model)
    twice = Prompt.from_strings(TEXTS[0], {"a": ["Paris", "Rome", "Paris", " Rome"]}, model)
    for scoring in ("first_token", "sequence"):
        wanted = run_prompts(model, [once], scoring=scoring, tqdm=None)["a"]
        assert torch.allclose(run_prompts(model, [twice], scoring=scoring, tqdm=None)["a"], wanted, atol=1e-6)


def test_errors_of_a_function_stay_incomplete_runs(tiny):
    """A target that only the function's own vocabulary is too small for is found when it has returned."""
    model = tiny("gpt2")

    def small(model, prompts, remote=False):
        return torch.full((len(prompts), 5), 0.2)

    with pytest.raises(IncompleteRunError, match="vocabulary of 5"):
        run_prompts(model, [Prompt("x", {"a": [7]})], get_probs_func=small, tqdm=None)
