"""Checkpoints that cannot be written: found before the work, and never at the cost of what was computed."""

import errno
import os
import warnings

import pytest
import torch

from nnterp.prompts import IncompleteRunError, Prompt, PromptResults, next_token_probs, run_prompts
from nnterp.prompts import _checkpoint as checkpoints
from nnterp.testing import tiny_model

TEXTS = ["The capital of France is", "The", "One", "Paris, Rome and", "What is the", "London"]


@pytest.fixture
def model(tiny):
    return tiny("gpt2")


@pytest.fixture
def prompts():
    return [Prompt(text, {"a": [20], "b": [30]}) for text in TEXTS]


@torch.no_grad()
def slow(tokenizer, texts):
    """HuggingFace's own probabilities of token 20, one prompt at a time."""
    module = tiny_model("gpt2")
    logits = [module(**tokenizer(text, return_tensors="pt")).logits[0, -1] for text in texts]
    return torch.stack([row.softmax(-1)[20] for row in logits])


def right(results, model):
    done = results.done
    assert results["a"][~done].isnan().all()
    wanted = slow(model.tokenizer, [text for text, ran in zip(TEXTS, done, strict=True) if ran])
    return bool((results["a"][done] - wanted).abs().max() < 1e-6)


class Disk:
    """A disk on which the writes of given numbers fail."""

    def __init__(self, monkeypatch, fails, error=None):
        self.writes, self.fails, self.fsync = 0, fails, os.fsync
        self.error = error or OSError(errno.ENOSPC, "No space left on device")
        monkeypatch.setattr(os, "fsync", self.write)

    def write(self, file):
        self.writes += 1
        if self.fails(self.writes):
            raise self.error
        self.fsync(file)


def failing(at, error):
    calls = []

    def function(model, prompts, remote=False):
        calls.append(1)
        if len(calls) == at:
            raise error
        return next_token_probs(model, prompts)

    return function


def test_a_folder_that_cannot_be_made_is_found_before_the_work(model, prompts, tmp_path):
    (tmp_path / "file").write_text("x")
    handle = model._module.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    try:
        for folder in (tmp_path / "file", tmp_path / "file" / "below", "/proc/nope"):
            with pytest.raises(OSError, match=f"{folder} cannot be written, so nothing was run") as info:
                run_prompts(model, prompts, checkpoint=folder, tqdm=None)
            assert not isinstance(info.value, IncompleteRunError)
    finally:
        handle.remove()
    run_prompts(model, prompts, checkpoint=tmp_path / "new" / "below", tqdm=None)
    assert PromptResults.load(tmp_path / "new" / "below").complete


def test_a_full_disk_is_found_before_the_work(model, prompts, tmp_path, monkeypatch):
    Disk(monkeypatch, lambda n: n == 1)
    with pytest.raises(OSError, match="No space left") as info:
        run_prompts(model, prompts, get_probs_func=failing(1, AssertionError()), checkpoint=tmp_path, tqdm=None)
    assert info.value.errno == errno.ENOSPC
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("error", [None, RuntimeError("broken"), MemoryError()])
def test_a_disk_that_fills_up_on_the_way(model, prompts, tmp_path, monkeypatch, error):
    """The run goes on, with a warning, and the last write succeeds."""
    monkeypatch.setattr(checkpoints, "SAVE_EVERY", 0.0)
    Disk(monkeypatch, lambda n: 2 < n <= 5, error)
    with pytest.warns(UserWarning, match=r"could not be written after \d of 6 prompts.*The run goes on") as caught:
        results = run_prompts(model, prompts, 2, checkpoint=tmp_path, tqdm=None)
    assert {w.filename for w in caught} == {__file__}
    assert results.complete
    assert right(results, model)
    assert torch.equal(PromptResults.load(tmp_path).log_probs, results.log_probs)


@pytest.mark.parametrize("error", [None, RuntimeError("broken"), KeyboardInterrupt()])
def test_a_last_write_that_fails(model, prompts, tmp_path, monkeypatch, error):
    """The error holds all results, and the folder what it held before."""
    disk = Disk(monkeypatch, lambda n: n > 2, error)
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else IncompleteRunError
    with pytest.raises(expected) as info:
        run_prompts(model, prompts, 2, checkpoint=tmp_path / "full", tqdm=None)
    if expected is IncompleteRunError:
        assert info.value.__cause__ is disk.error
        assert "All prompts were run, but the checkpoint" in str(info.value)
    partial = info.value.partial
    assert partial.complete
    assert right(partial, model)
    assert not PromptResults.load(tmp_path / "full").done.any()
    monkeypatch.undo()
    partial.save(tmp_path / "elsewhere")
    assert torch.equal(PromptResults.load(tmp_path / "elsewhere").log_probs, partial.log_probs)


@pytest.mark.parametrize("reason", [RuntimeError("REAL REASON"), KeyboardInterrupt("REAL REASON")])
def test_the_real_error_is_not_hidden(model, prompts, tmp_path, monkeypatch, reason):
    """A batch fails, and then the checkpoint cannot be written."""
    Disk(monkeypatch, lambda n: n > 2)
    function = failing(3, reason)
    with pytest.raises((IncompleteRunError, KeyboardInterrupt)) as info:
        run_prompts(model, prompts, 2, function, checkpoint=tmp_path, tqdm=None)
    error = info.value
    told = str(error) + "".join(getattr(error, "__notes__", ()))
    assert "REAL REASON" in told
    assert "No space left" in told
    assert "could not be written" in told
    assert (error is reason) if isinstance(reason, KeyboardInterrupt) else (error.__cause__ is reason)
    assert int(error.partial.done.sum()) == 4
    assert right(error.partial, model)
    monkeypatch.undo()
    rest = run_prompts(model, prompts, 2, function, resume=error.partial, tqdm=None)
    assert right(rest, model)


def test_what_the_last_write_held_is_resumed(model, prompts, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "SAVE_EVERY", 0.0)
    Disk(monkeypatch, lambda n: n > 4)  # before the first batch and after it
    with pytest.raises(IncompleteRunError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run_prompts(model, prompts, 2, checkpoint=tmp_path, tqdm=None)
    monkeypatch.undo()
    assert int(PromptResults.load(tmp_path).done.sum()) == 2
    seen = []
    handle = model._module.register_forward_pre_hook(lambda m, args, kwargs: seen.append(1), with_kwargs=True)
    results = run_prompts(model, prompts, 2, checkpoint=tmp_path, tqdm=None)
    handle.remove()
    assert len(seen) == 2
    assert right(results, model)


def test_metadata_that_cannot_be_saved_is_found_before_the_work(model, tmp_path):
    loop = {}
    loop["itself"] = loop
    with pytest.raises((ValueError, RecursionError)) as info:
        run_prompts(
            model,
            [Prompt("x", {"a": [3]}, metadata=loop)],
            get_probs_func=failing(1, AssertionError()),
            checkpoint=tmp_path,
            tqdm=None,
        )
    assert not isinstance(info.value, IncompleteRunError)
