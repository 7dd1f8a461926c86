"""Files of results: damaged and foreign ones are refused by name, and a write that is cut short loses nothing."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from nnterp.prompts import IncompleteRunError, Prompt, PromptResults, read_table, run_prompts

TEXTS = ["The capital of France is", "The"]
FILES = ["scores.safetensors", "run.json"]


@pytest.fixture
def results(tiny):
    model = tiny("gpt2")
    return run_prompts(model, [Prompt(text, {"a": [20], "b": [30]}) for text in TEXTS], tqdm=None)


@pytest.fixture
def others(tiny):
    model = tiny("gpt2")
    return run_prompts(model, [Prompt(text, {"c": [21], "d": [31]}) for text in TEXTS], tqdm=None)


def same(found, wanted):
    return found.categories == wanted.categories and torch.equal(found.log_probs, wanted.log_probs)


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 9, 40, 0.2, 0.5, 0.9, -1])
@pytest.mark.parametrize("name", FILES)
def test_truncated_files_are_named(results, tmp_path, name, kept):
    results.save(tmp_path)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: kept if isinstance(kept, int) else int(kept * len(data))])
    with pytest.raises(ValueError, match=rf"{name}.*(damaged|hand)") as info:
        PromptResults.load(tmp_path)
    assert str(tmp_path) in str(info.value)
    if name == "run.json" or kept not in (
        0.5,
        0.9,
        -1,
    ):  # the header is gone: it cannot be told any more whose file it was
        with pytest.raises(FileExistsError, match=rf"{name}.* is not overwritten"):
            results.save(tmp_path)
        (tmp_path / name).unlink()
    results.save(tmp_path)
    assert same(PromptResults.load(tmp_path), results)


def test_any_changed_byte_is_found(results, tmp_path):
    """In the header, in the numbers and in the record: no changed byte gives other results without an error."""
    results.save(tmp_path)
    for name in FILES:
        whole = (tmp_path / name).read_bytes()
        for at in range(0, len(whole), max(1, len(whole) // 300)):
            changed = bytearray(whole)
            changed[at] ^= 0x11
            (tmp_path / name).write_bytes(bytes(changed))
            try:
                found = PromptResults.load(tmp_path)
            except ValueError as error:
                assert str(tmp_path) in str(error)  # noqa: PT017
            else:
                assert same(found, results), (name, at)
        (tmp_path / name).write_bytes(whole)
    assert same(PromptResults.load(tmp_path), results)


FOREIGN = {
    "scores.safetensors": [b"", b"hello", b"\xff" * 100, b"{}", b"\x02\x00\x00\x00\x00\x00\x00\x00{}", b"\x00" * 8],
    "run.json": [b"", b"{}", b"[]", b"3", b"hello", b'{"version": 1}', b"\xff\xfe", b'{"epochs": 3}'],
}


@pytest.mark.parametrize(("name", "content"), [(name, content) for name in FOREIGN for content in FOREIGN[name]])
def test_a_foreign_file_is_not_overwritten(tiny, results, tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FileExistsError, match=rf"{name}.* is not overwritten"):
        results.save(tmp_path)
    model = tiny("gpt2")
    handle = model._module.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    try:
        with pytest.raises((FileExistsError, ValueError), match=name) as info:
            run_prompts(model, [Prompt("x", {"a": [3]})], checkpoint=tmp_path, tqdm=None)
    finally:
        handle.remove()
    assert not isinstance(info.value, IncompleteRunError)
    assert (tmp_path / name).read_bytes() == content
    assert os.listdir(tmp_path) == [name]


def test_a_foreign_safetensors_file(results, tmp_path):
    """A model's own weights in the same folder."""
    save_file({"weight": torch.ones(3)}, tmp_path / "scores.safetensors", metadata={"format": "pt"})
    with pytest.raises(FileExistsError, match=r"not written by PromptResults\.save"):
        results.save(tmp_path)
    with pytest.raises(ValueError, match=r"scores\.safetensors was not written by PromptResults\.save"):
        PromptResults.load(tmp_path)
    assert torch.equal(load_file(tmp_path / "scores.safetensors")["weight"], torch.ones(3))


def test_own_files_are_replaced(results, others, tmp_path):
    results.save(tmp_path)
    others.save(tmp_path)
    assert same(PromptResults.load(tmp_path), others)
    assert sorted(os.listdir(tmp_path)) == sorted(FILES)


class Cut(Exception):
    pass


@pytest.mark.parametrize("before", [False, True], ids=["into an empty folder", "over older results"])
def test_a_write_that_is_cut_short(results, others, tmp_path, monkeypatch, before):
    """At every call that touches a file, before and after it: the older results are there, or the new ones."""
    seen = set()
    for stop in range(60):
        folder = tmp_path / str(stop)
        if before:
            others.save(folder)
        count = iter(range(10**6))

        def cut(function, after, count=count, stop=stop):
            def call(*args, **kwargs):
                if not after and next(count) == stop:
                    raise Cut
                result = function(*args, **kwargs)
                if after and next(count) == stop:
                    raise Cut
                return result

            return call

        with monkeypatch.context() as patch:
            for owner, name in ((os, "replace"), (Path, "unlink"), (os, "fsync"), (Path, "open"), (Path, "mkdir")):
                patch.setattr(owner, name, cut(cut(getattr(owner, name), False), True))
            try:
                results.save(folder)
                finished = True
            except Cut:
                finished = False
        try:
            found = PromptResults.load(folder)
        except FileNotFoundError:
            assert not before
            seen.add("nothing")
        else:
            assert same(found, results) or (before and same(found, others))
            seen.add("new" if same(found, results) else "old")
        results.save(folder)  # what was left behind is no obstacle
        assert same(PromptResults.load(folder), results)
        if finished:
            break
    assert finished
    assert seen == ({"old", "new"} if before else {"nothing", "new"})


def test_the_record_is_in_both_files(results, tmp_path):
    results.save(tmp_path)
    (tmp_path / "run.json").unlink()
    assert same(PromptResults.load(tmp_path), results)
    assert PromptResults.load(tmp_path).texts == TEXTS
    (tmp_path / "scores.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="holds no results"):
        PromptResults.load(tmp_path)


def test_files_of_the_first_version_are_read(results, tmp_path):
    """They had the record in `run.json` alone, and no checksum of the numbers."""
    import hashlib

    results.save(tmp_path)
    tensors = load_file(tmp_path / "scores.safetensors")
    del tensors["run"]
    marks = {"run": hashlib.sha256((tmp_path / "run.json").read_bytes()).hexdigest()}
    save_file(tensors, tmp_path / "scores.safetensors", metadata=marks)
    assert same(PromptResults.load(tmp_path), results)
    (tmp_path / "run.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"run\.json"):
        PromptResults.load(tmp_path)


def test_metadata_of_any_kind_is_saved(tiny, tmp_path):
    model = tiny("gpt2")
    metadata = {
        "number": np.float32(1.5),
        "vector": torch.arange(3),
        "array": np.eye(2),
        3: "an integer for a key",
        ("a", 1): {"nested": {None: [np.int64(4)]}},
        "path": Path("x"),
    }
    results = run_prompts(model, [Prompt("x", {"a": [3]}, metadata=metadata)], checkpoint=tmp_path, tqdm=None)
    assert torch.equal(PromptResults.load(tmp_path).log_probs, results.log_probs)
    assert PromptResults.load(tmp_path).metadata == [
        {
            "number": 1.5,
            "vector": [0, 1, 2],
            "array": [[1, 0], [0, 1]],
            "3": "an integer for a key",
            "('a', 1)": {"nested": {"None": [4]}},
            "path": "x",
        }
    ]


def test_a_changed_record_is_found(results, tmp_path):
    results.save(tmp_path)
    record = json.loads((tmp_path / "run.json").read_text())
    record["prompts"][0]["text"] = "another"
    (tmp_path / "run.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"run\.json was changed"):
        PromptResults.load(tmp_path)


# -- tables ------------------------------------------------------------------------------------------------------------


def test_damaged_tables_are_named(tmp_path):
    for name, content, match in (
        ("a.json", b'[{"a": 1}, {"a"', "no JSON"),
        ("a.json", b"\xff\xfe\x00", "no text in UTF-8"),
        ("a.jsonl", b'{"a": 1}\n{"a"', "line 2"),
        ("a.jsonl", b"\xff\xfe\x00", "no text in UTF-8"),
        ("a.csv", b"a,b\n1,\xff\n", "no text in UTF-8"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}.*{match}"):
            read_table(tmp_path / name)


def test_line_separators_inside_texts(tmp_path):
    rows = [{"a": "one\u2028two", "b": "three\x85\x1cfour"}, {"a": "", "b": "five"}]
    (tmp_path / "t.jsonl").write_text("\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows[:1]), newline="")
    assert read_table(tmp_path / "t.jsonl") == rows[:1]
    (tmp_path / "t.csv").write_text('a,b\r\n"one\r\ntwo",three\u2028four\r\n', encoding="utf-8", newline="")
    assert read_table(tmp_path / "t.csv") == [{"a": "one\r\ntwo", "b": "three\u2028four"}]
