"""Whole answers by teacher forcing, against a loop over single answers through HuggingFace's own forward."""

import math

import pytest
import torch

from nnterp.prompts import (
    CollisionError,
    IncompleteRunError,
    Prompt,
    TokenizationError,
    next_token_probs,
    next_token_probs_unsqueeze,
    run_prompts,
)
from nnterp.testing import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore::nnterp.prompts.SharedTokenWarning")

TEXTS = ["The capital of France is", "The", "When Mary and John went to the store, John gave a drink to"]
TARGETS = {"target": ["Paris", "New York"], "other": ["New Delhi", "Rome", "the city of London"]}


def make(tokenizer, texts=TEXTS, targets=TARGETS):
    return [Prompt.from_strings(text, targets, tokenizer) for text in texts]


@torch.no_grad()
def answer_logs(module, tokenizer, prompt, answer):
    """Log-probability of each token of an answer after a space, by itself."""
    before = tokenizer(prompt)["input_ids"]
    plain = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    whole = tokenizer(f"{prompt} {answer}", add_special_tokens=False)["input_ids"]
    assert whole[: len(plain)] == plain
    rest = whole[len(plain) :]
    logs = module(input_ids=torch.tensor([before + rest])).logits[0].float().log_softmax(-1)
    return torch.stack([logs[len(before) - 1 + k, token] for k, token in enumerate(rest)])


def slow(module, tokenizer, texts=TEXTS, targets=TARGETS, normalize=False):
    found = {}
    for name, answers in targets.items():
        scores = []
        for text in texts:
            logs = [answer_logs(module, tokenizer, text, answer) for answer in answers]
            if normalize:
                scores.append(max(each.mean() for each in logs))
            else:
                scores.append(torch.stack([each.sum() for each in logs]).logsumexp(0))
        found[name] = torch.stack(scores)
    return found


def close(found, wanted, tolerance=5e-5):
    for name in wanted:
        assert found[name].shape == wanted[name].shape
        assert (found[name] - wanted[name]).abs().max() < tolerance, name


@pytest.mark.parametrize(
    "model_type", ["gpt2", "llama", "gemma2", "qwen3", "bloom", "opt", "cohere", "granite", "mamba", "recurrent_gemma"]
)
@pytest.mark.parametrize("normalize", [False, True])
def test_architectures(model_type, normalize, tiny):
    model = tiny(model_type)
    options = {"scoring": "sequence", "normalize_length": normalize, "batch_size": 4, "tqdm": None}
    results = run_prompts(model, make(model.tokenizer), **options)
    close(results, slow(tiny_model(model_type), model.tokenizer, normalize=normalize))
    assert results.scoring == "sequence"


def test_tokenizers(tokenizer_kind, model_with, tokenizer_of_kind):
    model, tokenizer = model_with("llama", tokenizer_kind), tokenizer_of_kind(tokenizer_kind)
    results = run_prompts(model, make(tokenizer), scoring="sequence", tqdm=None)
    close(results, slow(tiny_model("llama"), tokenizer))


@torch.no_grad()
def answer_logs_by_beginnings(module, tokenizer, prompt, answer):
    """As `answer_logs`, one forward for each token."""
    before = tokenizer(prompt)["input_ids"]
    rest = tokenizer(f"{prompt} {answer}")["input_ids"][len(before) :]
    logs = [
        module(input_ids=torch.tensor([before + rest[:k]])).logits[0, -1].float().log_softmax(-1)[token]
        for k, token in enumerate(rest)
    ]
    return torch.stack(logs)


# Attention in both directions, keys chosen with a look at all of them, streams side by side, a last layer that idles.
ODD = [
    "cpmant",
    "paligemma",
    "deepseek_v32",
    "axk2",
    "deepseek_v4",
    "gemma3n_text",
    "mllama",
    "xlnet",
    "prophetnet",
    "blt",
]


@pytest.mark.parametrize("model_type", ODD)
def test_architectures_that_do_not_read_on_the_way(model_type, tiny, monkeypatch):
    model, module = tiny(model_type), tiny_model(model_type)
    prompts = make(model.tokenizer)
    monkeypatch.setitem(globals(), "answer_logs", answer_logs_by_beginnings)
    close(run_prompts(model, prompts, scoring="sequence", tqdm=None), slow(module, model.tokenizer), 2e-4)
    with torch.no_grad():
        probs = [module(**model.tokenizer(text, return_tensors="pt")).logits[0, -1].softmax(-1) for text in TEXTS]
    found = run_prompts(model, prompts, tqdm=None)
    for name in found:
        wanted = torch.stack([p[q.target_tokens[name]].sum() for p, q in zip(probs, prompts, strict=True)])
        assert (found[name] - wanted).abs().max() < 1e-5


@pytest.mark.parametrize("normalize", [False, True])
def test_functions_give_the_same_by_rows(tiny, lens, whole_lens, normalize):
    model = tiny("gemma2")
    prompts = make(model.tokenizer)
    options = {"scoring": "sequence", "normalize_length": normalize, "batch_size": 3, "tqdm": None}
    own = run_prompts(model, prompts, **options)
    close(run_prompts(model, prompts, get_probs_func=next_token_probs, **options), own)
    axis = run_prompts(model, prompts, get_probs_func=next_token_probs_unsqueeze, **options)
    close({name: values[:, 0] for name, values in axis.items()}, own)
    layered = run_prompts(model, prompts, get_probs_func=lens, **options)
    assert layered["target"].shape == (len(prompts), model.num_layers)
    close({name: values[:, -1] for name, values in layered.items()}, own)
    close(layered, run_prompts(model, prompts, get_probs_func=whole_lens, **options))


def test_one_row_per_branch(tiny):
    """Teacher forcing reads an answer in one row, and what answers have in common once."""
    from nnterp.prompts._plan import make_plan

    model = tiny("gpt2")
    row = model.tokenizer(TEXTS[0])["input_ids"]
    ids = [model.tokenizer(f" {answer}")["input_ids"] for answer in ("Paris", "New York", "New Delhi")]
    prompt = Prompt.from_strings(TEXTS[0], {"target": ["Paris", "New York"], "other": ["New Delhi"]}, model)
    plan = make_plan(model, [prompt], "sequence")
    rows = [list(r.ids) for r in plan.sheets[0].rows]
    assert sorted(rows) == sorted(row + answer[:-1] for answer in ids if len(answer) > 1)
    by_rows = make_plan(model, [prompt], "sequence", teacher_forcing=False)
    beginnings = {tuple(row + answer[:k]) for answer in ids for k in range(len(answer))}
    assert {r.ids for r in by_rows.sheets[0].rows} == beginnings


def test_an_answer_that_continues_another_is_part_of_it(tiny):
    model = tiny("llama")
    short = run_prompts(model, make(model.tokenizer, targets={"target": "New"}), scoring="sequence", tqdm=None)
    both = run_prompts(
        model, make(model.tokenizer, targets={"target": ["New", "New York"]}), scoring="sequence", tqdm=None
    )
    close(both, short)


def test_all_continuations_sum_to_one(tiny):
    """Log-probabilities of all one-token continuations are a distribution."""
    model = tiny("gpt2")
    names = [t for t in model.tokenizer.get_vocab() if t.isascii() and t.isalpha() and len(t) == 1]
    prompts = make(model.tokenizer, TEXTS[:1], {name: name for name in names})
    scores = run_prompts(model, prompts, scoring="sequence", answer_prefix="", tqdm=None)
    probs = next_token_probs(model, TEXTS[0])[0]
    for name in names:
        assert math.isclose(
            scores[name].exp().item(), probs[model.tokenizer.convert_tokens_to_ids(name)].item(), rel_tol=1e-4
        )


def test_what_stands_between_prompt_and_answer(tiny):
    model = tiny("gpt2")
    spaced = run_prompts(model, make(model.tokenizer, TEXTS, {"t": " Paris"}), scoring="sequence", tqdm=None)
    close(run_prompts(model, make(model.tokenizer, TEXTS, {"t": "Paris"}), scoring="sequence", tqdm=None), spaced)
    colon = run_prompts(
        model, make(model.tokenizer, TEXTS, {"t": "Paris"}), scoring="sequence", answer_prefix=": ", tqdm=None
    )
    close(
        colon,
        run_prompts(
            model, make(model.tokenizer, TEXTS, {"t": ": Paris"}), scoring="sequence", answer_prefix="", tqdm=None
        ),
    )
    line = make(model.tokenizer, ["Answer:\n"], {"t": "Paris"})
    bare = run_prompts(model, line, scoring="sequence", answer_prefix="", tqdm=None)
    close(run_prompts(model, line, scoring="sequence", tqdm=None), bare)


def test_token_ids_and_chats(tokenizer_of_kind, model_with):
    tokenizer, model = tokenizer_of_kind("chat"), model_with("llama", "chat")
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    prompts = [Prompt.from_strings(p, {"t": "Paris"}, tokenizer) for p in (chat, text, tokenizer(text)["input_ids"])]
    scores = run_prompts(model, prompts, scoring="sequence", tqdm=None)["t"]
    assert (scores - scores[0]).abs().max() < 1e-5


def test_bad_answers_are_refused_before_anything_runs(tiny, tokenizer_of_kind, model_with):
    model = tiny("gpt2")
    handle = model._module.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))

    def refused(prompts, match, error=ValueError, **kwargs):
        with pytest.raises(error, match=match) as info:
            run_prompts(model, prompts, scoring="sequence", tqdm=None, **kwargs)
        assert not isinstance(info.value, IncompleteRunError)

    try:
        refused([Prompt("x", {"target": [3]})], "target_strings")
        refused([Prompt("x", {"target": [3]}, {"target": ""})], "empty text", TokenizationError)
        refused([Prompt("x", {"target": [3]}, {"target": []})], "'target' is empty")
        refused([Prompt("x", {"target": [3]}, {"target": "a " * model._module.config.n_positions})], "longest answer")
        same = Prompt("x", {"a": [3], "b": [4]}, {"a": "Paris", "b": ["Rome", "Paris"]})
        refused([same], "'a', 'b' share an answer", CollisionError, distinct=True)
    finally:
        handle.remove()
    pieces = model_with("llama", "word_piece")
    with pytest.raises(TokenizationError, match="does not know all"):
        run_prompts(pieces, [Prompt("x", {"t": [3]}, {"t": "Paris 東京"})], scoring="sequence", tqdm=None)
    with pytest.raises(TokenizationError, match="no tokens"):
        run_prompts(pieces, [Prompt("x", {"t": [3]}, {"t": "\u200b"})], scoring="sequence", tqdm=None)


# -- answers that continue another answer ------------------------------------------------------------------------------

NESTED = {
    "two tokens longer": ["Paris is", "Paris"],
    "one token longer": ["New", "New York"],
    "a chain": ["the", "the city", "the city of", "the city of London"],
    "two branches": ["New", "New York", "New Delhi", "Paris is", "Rome", "Paris"],
    "twice": ["Paris", "Paris is", "Paris", "Paris is"],
}


def slow_nested(module, tokenizer, text, answers, normalize):
    """Scores one answer at a time; an answer that begins with another one's text is left out of the sum."""
    logs = {answer: answer_logs(module, tokenizer, text, answer) for answer in answers}
    if normalize:
        return max(each.mean() for each in logs.values())
    apart = [a for a in logs if not any(a != b and a.startswith(f"{b} ") for b in logs)]
    return torch.stack([logs[answer].sum() for answer in apart]).logsumexp(0)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("answers", NESTED.values(), ids=NESTED)
def test_nested_answers_against_a_loop(tiny, lens, whole_lens, answers, normalize):
    model, module = tiny("gpt2"), tiny_model("gpt2")
    targets = {"nested": answers, "other": ["Rome is not", "London"]}
    prompts = make(model.tokenizer, targets=targets)
    wanted = {
        name: torch.stack([slow_nested(module, model.tokenizer, text, own, normalize) for text in TEXTS])
        for name, own in targets.items()
    }
    options = {"scoring": "sequence", "normalize_length": normalize, "batch_size": 4, "tqdm": None}
    close(run_prompts(model, prompts, **options), wanted)
    close(run_prompts(model, prompts, get_probs_func=next_token_probs, **options), wanted)
    for function in (lens, whole_lens):
        layered = run_prompts(model, prompts, get_probs_func=function, **options)
        close({name: values[:, -1] for name, values in layered.items()}, wanted)


def test_the_longer_answer_may_be_the_best_per_token(tiny):
    """Of two answers that share their first token, the better mean is taken even if it is the longer one's."""
    model, module = tiny("gpt2"), tiny_model("gpt2")
    longer = 0
    for text in [f"{word} {i}" for word in ("The", "Paris", "Rome", "One") for i in range(6)]:
        means = [answer_logs(module, model.tokenizer, text, answer).mean() for answer in ("Paris", "Paris is")]
        [prompt] = make(model.tokenizer, [text], {"t": ["Paris", "Paris is"]})
        found = run_prompts(model, [prompt], scoring="sequence", normalize_length=True, tqdm=None)
        close(found, {"t": torch.stack(means).amax(0, keepdim=True)})
        longer += int(means[1] > means[0])
    assert 0 < longer < 24, "both cases have to occur"


@pytest.mark.parametrize("model_type", ["xlnet", "mamba", "paligemma"])
@pytest.mark.parametrize("normalize", [False, True])
def test_nested_answers_where_each_token_has_a_row(model_type, normalize, tiny, monkeypatch):
    model, module = tiny(model_type), tiny_model(model_type)
    monkeypatch.setitem(globals(), "answer_logs", answer_logs_by_beginnings)
    answers = NESTED["two branches"]
    prompts = make(model.tokenizer, TEXTS[:1], {"t": answers})
    found = run_prompts(model, prompts, scoring="sequence", normalize_length=normalize, tqdm=None)
    close(found, {"t": slow_nested(module, model.tokenizer, TEXTS[0], answers, normalize)[None]}, 2e-4)


@pytest.mark.parametrize("normalize", [False, True])
def test_every_row_is_asked_something(tiny, normalize):
    from nnterp.prompts._plan import make_plan

    model = tiny("gpt2")
    for answers in NESTED.values():
        for teacher_forcing in (False, True):
            prompts = make(model.tokenizer, targets={"a": answers, "b": answers[::-1]})
            plan = make_plan(model, prompts, "sequence", teacher_forcing, normalize_length=normalize)
            assert all(questions for sheet in plan.sheets for questions in sheet.questions)


def test_a_shared_answer_is_found_behind_a_shorter_one(tiny):
    model = tiny("gpt2")
    prompts = make(model.tokenizer, TEXTS[:1], {"a": ["Paris", "Paris is"], "b": ["Paris is"]})
    for normalize in (False, True):
        with pytest.raises(CollisionError, match="'a', 'b' share an answer"):
            run_prompts(model, prompts, scoring="sequence", normalize_length=normalize, distinct=True, tqdm=None)
