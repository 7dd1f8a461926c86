"""Results: what they say of themselves, and what comes back from disk."""

import math
import pickle

import pytest
import torch

from nnterp.prompts import Prompt, PromptResults, run_prompts

TEXTS = ["The capital of France is", "The", "Paris, Rome and", "One"]
TARGETS = {"target": "Paris", "other": ["London", "Madrid"], "third": "Rome"}


@pytest.fixture
def model(tiny):
    return tiny("gpt2")


@pytest.fixture
def prompts(model):
    return [
        Prompt.from_strings(text, TARGETS, model, metadata={"place": i, "kind": text[:3]})
        for i, text in enumerate(TEXTS)
    ]


@pytest.fixture
def flat(model, prompts):
    return run_prompts(model, prompts, tqdm=None)


@pytest.fixture
def layered(model, prompts, lens):
    return run_prompts(model, prompts, get_probs_func=lens, tqdm=None)


def test_a_dict_as_in_1x(flat):
    assert isinstance(flat, dict)
    assert set(flat) == set(TARGETS)
    assert [name for name, _ in flat.items()] == list(TARGETS)
    assert torch.equal(torch.stack(list(flat.values())), torch.stack([flat[name] for name in TARGETS]))
    assert all(0 < p < 1 for values in flat.values() for p in values)


def test_ranks_and_accuracy(flat, layered, model, prompts):
    for results in (flat, layered):
        stacked = torch.stack([results[name] for name in TARGETS])
        for i, name in enumerate(TARGETS):
            assert torch.equal(results.ranks(name), (stacked > stacked[i]).sum(0) + 1)
            assert torch.allclose(torch.as_tensor(results.accuracy(name)), (stacked.argmax(0) == i).float().mean(0))
    assert isinstance(flat.accuracy(), float)
    assert layered.accuracy().shape == (model.num_layers,)
    probs = torch.stack([torch.as_tensor(p) for p in _distributions(model)])
    for name in TARGETS:
        best = torch.stack([row[prompt.target_tokens[name]].max() for row, prompt in zip(probs, prompts, strict=True)])
        assert torch.equal(flat.ranks(name, "vocabulary"), (probs > best[:, None]).sum(-1) + 1)
    assert flat.accuracy(among="vocabulary") == (flat.ranks(among="vocabulary") == 1).float().mean()


def _distributions(model):
    from nnterp.prompts import next_token_probs

    return next_token_probs(model, TEXTS)


def test_logit_difference_is_that_of_logits(model, lens):
    prompts = [Prompt(text, {"a": [20], "b": [30]}) for text in TEXTS]
    found = run_prompts(model, prompts, tqdm=None).logit_difference("a", "b")
    with torch.no_grad():
        logits = [model._module(**model.tokenizer(text, return_tensors="pt")).logits[0, -1] for text in TEXTS]
    assert torch.allclose(found, torch.stack([row[20] - row[30] for row in logits]), atol=1e-4)
    assert run_prompts(model, prompts, get_probs_func=lens, tqdm=None).logit_difference("a", "b").shape == (4, 4)


def test_a_tie_counts_against(model):
    results = run_prompts(model, [Prompt("x", {"a": [20], "b": [20]})], tqdm=None)
    assert results.ranks("a").tolist() == results.ranks("b").tolist() == [2]
    assert results.accuracy("a") == results.accuracy("b") == 0


def test_what_cannot_be_asked(flat, layered, model):
    with pytest.raises(KeyError, match="'target', 'other', 'third'"):
        flat.accuracy("wrong")
    with pytest.raises(ValueError, match="known only for the model's own"):
        layered.ranks(among="vocabulary")
    with pytest.raises(ValueError, match="among='all'"):
        flat.ranks(among="all")
    with pytest.raises(ValueError, match="only category"):
        run_prompts(model, [Prompt("x", {"a": [20]})], tqdm=None).accuracy("a")


def test_dataframe(flat, layered, model):
    frame = flat.to_dataframe()
    assert list(frame.columns) == ["prompt_index", "prompt", "category", "probability", "place", "kind"]
    assert len(frame) == len(TEXTS) * len(TARGETS)
    row = frame[(frame.prompt_index == 2) & (frame.category == "other")].iloc[0]
    assert row.prompt == TEXTS[2]
    assert row.place == 2
    assert math.isclose(row.probability, flat["other"][2].item(), rel_tol=1e-6)
    deep = layered.to_dataframe()
    assert len(deep) == len(frame) * model.num_layers
    cell = deep[(deep.prompt_index == 1) & (deep.category == "third") & (deep.layer == 2)]
    assert math.isclose(cell.probability.item(), layered["third"][1, 2].item(), rel_tol=1e-6)
    whole = run_prompts(model, [Prompt.from_strings("x", "Paris", model)], scoring="sequence", tqdm=None)
    assert "log_probability" in whole.to_dataframe().columns


def same(a, b):
    assert a.categories == b.categories
    assert a.texts == b.texts
    assert a.settings == b.settings
    assert a.metadata == b.metadata
    assert a.fingerprints == b.fingerprints
    assert torch.equal(a.log_probs, b.log_probs)
    assert torch.equal(a.done, b.done)
    assert (a.vocabulary_ranks is None) == (b.vocabulary_ranks is None)
    for name in a:
        assert torch.equal(a[name], b[name])


def test_save_and_load(flat, layered, tmp_path):
    for i, results in enumerate((flat, layered)):
        results.save(tmp_path / str(i))
        same(PromptResults.load(tmp_path / str(i)), results)
        same(pickle.loads(pickle.dumps(results)), results)
    with pytest.raises(FileNotFoundError, match="holds no results"):
        PromptResults.load(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["scores.safetensors", "run.json"])
def test_files_of_different_runs_do_not_mix(flat, model, prompts, tmp_path, name):
    flat.save(tmp_path / "a")
    run_prompts(model, prompts[::-1], tqdm=None).save(tmp_path / "b")
    (tmp_path / "a" / name).write_bytes((tmp_path / "b" / name).read_bytes())
    with pytest.raises(ValueError, match="not of one run"):
        PromptResults.load(tmp_path / "a")


def test_plot(flat, layered):
    figure = layered.plot(band=None)
    assert [line.name for line in figure.data] == list(TARGETS)
    for line in figure.data:
        assert torch.allclose(torch.tensor(line.y).float(), layered[line.name].mean(0), atol=1e-6)
    with pytest.raises(ValueError, match="no axis of layers"):
        flat.plot()


def test_plot_without_a_display_package(layered, monkeypatch):
    monkeypatch.setattr("nnterp.plugins.load", lambda group, name: None)
    with pytest.raises(ImportError, match="nnterp-display"):
        layered.plot()


def test_it_says_what_it_is(flat, layered, model):
    assert repr(flat).startswith("<PromptResults: 4 of 4 prompts; mean probability 'target': ")
    assert f"{model.num_layers} layers" in repr(layered)
    assert layered.num_layers == model.num_layers
    assert flat.num_layers is None
    assert flat.complete
