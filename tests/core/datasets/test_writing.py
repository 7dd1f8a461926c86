"""Writing that is cut short, refused, shared by processes, or fed from a stream: the bytes on the disk are the same."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import UserDict

import pytest
import torch

import nnterp

from .processes import contents, ended, forked, killed_at

COUNTRIES = ("France", "Spain", "Italy", "Japan", "Egypt")
PROMPTS = [f"The capital of {country}{' is' * k}" for k in (1, 0, 3) for country in COUNTRIES] + ["Hello"]
fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")


def write(model, folder, prompts=PROMPTS, **options):
    options = {"values": "layers_output", "prompts_per_shard": 3, "batch_size": 2, "progress": False, **options}
    return model.collect(prompts, to=folder, **options)


def counted_traces(model, monkeypatch, note=lambda: None):
    """A list that grows by what `note` returns with every forward pass."""
    found, trace = [], type(model).trace

    def traced(self, *arguments, **keywords):
        found.append(note())
        return trace(self, *arguments, **keywords)

    monkeypatch.setattr(type(model), "trace", traced)
    return found


@pytest.fixture
def whole(toy, tmp_path_factory):
    """The files of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole") / "dataset"
    write(toy, folder)
    return contents(folder)


@fork
def test_killed_runs_leave_the_bytes_of_an_uninterrupted_one(toy, tmp_path, whole):
    folder, chance, kills = tmp_path / "dataset", random.Random(0), 0

    def work(call):
        with killed_at(call):
            write(toy, folder)

    for call in (*range(1, 5), *(chance.randint(1, 70) for _ in range(100))):
        if (how := ended(forked(lambda call=call: work(call)))) == 0:
            break
        assert how == -signal.SIGKILL
        kills += 1
        if contents(folder).get("manifest.json") != whole["manifest.json"]:  # never taken for the whole
            with pytest.raises((ValueError, FileNotFoundError)):
                nnterp.ActivationDataset.open(folder)
    assert kills >= 8
    assert contents(folder) == whole
    dataset = write(toy, folder)
    assert contents(folder) == whole
    dataset.verify()


def test_what_is_whole_is_not_run_again(toy, tmp_path, whole, monkeypatch):
    folder = tmp_path / "dataset"
    stop = iter(PROMPTS)

    def breaking():
        for _ in range(10):
            yield next(stop)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as caught:
        write(toy, folder, breaking())
    assert "goes on from there" in caught.value.__notes__[-1]
    part = nnterp.ActivationDataset.open(folder, partial=True)
    assert (len(part), part.complete) == (9, False)
    with pytest.raises(ValueError, match="not complete"):
        nnterp.ActivationDataset.open(folder)
    runs = counted_traces(toy, monkeypatch)
    write(toy, folder)
    assert len(runs) == 5  # 3 + 3 + 1 prompts, two at a time
    assert contents(folder) == whole


@fork
def test_two_processes_write_the_dataset_of_one(toy, tmp_path, whole):
    folder = tmp_path / "dataset"

    def work(rank, call):
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
        with killed_at(call):
            dataset = write(toy, folder)
        assert dataset.complete or rank == 1

    children = [forked(lambda: work(0, 40)), forked(lambda: work(1, -1))]
    assert [ended(child) for child in children] == [-signal.SIGKILL, 0]
    assert not nnterp.ActivationDataset.open(folder, partial=True).complete
    assert ended(forked(lambda: work(0, -1))) == 0  # the killed one alone, started again
    assert contents(folder) == whole
    assert len(nnterp.ActivationDataset.open(folder)) == len(PROMPTS)


@fork
def test_a_second_writer_is_refused_and_a_dead_one_is_not_waited_for(toy, tmp_path, whole):
    folder, ready = tmp_path / "dataset", tmp_path / "ready"

    def slow():
        yield from PROMPTS[:6]
        ready.touch()
        time.sleep(600)

    child = forked(lambda: write(toy, folder, slow()))
    try:
        while not ready.exists():
            time.sleep(0.01)
        with pytest.raises(BlockingIOError, match=f"process {child} on"):
            write(toy, folder)
        with pytest.raises(BlockingIOError, match="shares of 1 processes"):
            write(toy, folder, rank=(1, 2))
    finally:
        os.kill(child, signal.SIGKILL)
        ended(child)
    write(toy, folder)
    assert contents(folder) == whole


@pytest.mark.parametrize(
    "environment", [{"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "0"}, {"RANK": "a", "WORLD_SIZE": "2"}]
)
def test_ranks_that_are_none_are_refused(toy, tmp_path, monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"rank|RANK"):
        write(toy, tmp_path / "dataset")
    assert not (tmp_path / "dataset").exists()


def test_processes_with_other_prompts_are_noticed(toy, tmp_path):
    write(toy, tmp_path / "dataset", rank=(0, 2))
    with pytest.raises(ValueError, match="not given the same"):
        write(toy, tmp_path / "dataset", PROMPTS[:6], rank=(1, 2))


# -- sources ----------------------------------------------------------------------------------------------------------


class Stream:
    """As a `datasets` stream: iterable, without length or indices."""

    def __init__(self, rows):
        self.rows, self.taken = rows, 0

    def __iter__(self):
        for row in self.rows:
            self.taken += 1
            yield row


def test_prompts_from_every_source_give_the_same_bytes(toy, tmp_path, whole):
    file = tmp_path / "prompts.jsonl"
    lines = [json.dumps(p if i % 2 else {"text": p, "id": i}) for i, p in enumerate(PROMPTS)]
    file.write_text("\n".join(lines) + "\n\n")
    sources = {
        "jsonl": file,
        "generator": (prompt for prompt in PROMPTS),
        "stream": Stream([{"text": prompt, "source": "web"} for prompt in PROMPTS]),
        "mappings": [UserDict(prompt=prompt) for prompt in PROMPTS],
    }
    for name, source in sources.items():
        write(toy, tmp_path / name, source)
        assert contents(tmp_path / name) == whole, name


def test_tokenized_rows_without_their_padding(toy, tmp_path):
    encoded = toy.tokenizer(PROMPTS, padding=True)
    rows = [dict(zip(encoded, row, strict=True)) for row in zip(*encoded.values(), strict=True)]
    dataset = write(toy, tmp_path / "dataset", Stream(rows), positions=-1)
    texts = toy.collect(PROMPTS, "layers_output", positions=-1)
    torch.testing.assert_close(dataset["layers_output"].tensor(), texts["layers_output"], rtol=1e-4, atol=1e-4)


def test_a_stream_is_read_no_further_than_one_shard(toy, tmp_path, monkeypatch):
    stream = Stream(PROMPTS)
    ahead = counted_traces(toy, monkeypatch, lambda: stream.taken)
    write(toy, tmp_path / "dataset", stream, batch_size=3)
    assert ahead == [3, 6, 9, 12, 15, 16]


@pytest.mark.parametrize(
    ("prompts", "error", "says"),
    [
        (iter([]), ValueError, "No prompts"),
        (iter(["a cat", 3]), TypeError, "Prompt 1"),
        (iter([{"question": "a"}]), ValueError, "question"),
        (iter([{"text": "a", "prompt": "b"}]), ValueError, "exactly one"),
        (iter(["a"] * 4 + [""]), ValueError, "Prompt 4"),
        (iter(["a"] * 4 + [[10**9]]), ValueError, "Prompt 4"),
    ],
)
def test_bad_prompts_are_named(toy, tmp_path, prompts, error, says):
    with pytest.raises(error, match=says):
        write(toy, tmp_path / "dataset", prompts)


def test_bad_lines_are_named(toy, tmp_path):
    (tmp_path / "bad.jsonl").write_text('"one"\n\n{"text": "two"\n')
    with pytest.raises(ValueError, match=r"Line 3 of .*bad\.jsonl"):
        write(toy, tmp_path / "dataset", tmp_path / "bad.jsonl")
    with pytest.raises(FileNotFoundError, match=r"absent\.jsonl"):
        write(toy, tmp_path / "dataset", tmp_path / "absent.jsonl")
    with pytest.raises(ValueError, match="give Path"):
        write(toy, tmp_path / "dataset", str(tmp_path / "bad.jsonl"))
    with pytest.raises(IndexError, match="Prompt 0 has"):
        write(toy, tmp_path / "dataset", positions=100)
    write(toy, tmp_path / "dataset", positions=0)  # a call that wrote nothing leaves the folder free
    with pytest.raises(ValueError, match="rank is for"):
        toy.collect(PROMPTS, "layers_output", rank=(0, 2))


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"values": "mlps_output"}, r"values = 'layers_output.*mlps_output"),
        ({"layers": [1, 2]}, "values"),
        ({"positions": -1}, r"positions = 'all', and this call has '-1'"),
        ({"dtype": torch.bfloat16}, r"stored dtype.*bfloat16"),
        ({"prompts_per_shard": 4}, r"prompts_per_shard = 3, and this call has 4"),
        ({"prompts": [*PROMPTS[:4], "Goodbye", *PROMPTS[5:]]}, r"prompt 4 is .*this call has 'Goodbye'"),
        ({"prompts": PROMPTS[:-1]}, "16 prompts|other prompts"),
        ({"prompts": PROMPTS[:5]}, "more prompts than this call"),
        ({"prompts": [*PROMPTS, "and more"]}, "ends before prompt 16"),
    ],
)
def test_another_call_in_the_same_folder_is_refused(toy, tmp_path, whole, options, says):
    write(toy, tmp_path / "dataset")
    with pytest.raises(ValueError, match=says):
        write(toy, tmp_path / "dataset", **options)
    assert contents(tmp_path / "dataset") == whole


def test_another_model_is_refused(toy, tmp_path):
    folder = tmp_path / "dataset"
    write(toy, folder)
    with toy.steering(torch.ones(128), 2), pytest.raises(ValueError, match="steering"):
        write(toy, folder)
    other = nnterp.StandardizedTransformer(nnterp.toy_checkpoint())
    other.dispatch()
    with torch.no_grad():
        other._module.model.layers[3].mlp.down_proj.weight[0, 0] += 1
    with pytest.raises(ValueError, match="weights"):
        write(other, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["versions"]["torch"] = "2.8.0"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"the version of torch = '2\.8\.0'"):
        write(toy, folder)


def test_another_batch_size_goes_on(toy, tmp_path):
    with pytest.raises(ZeroDivisionError):
        write(toy, tmp_path / "dataset", (prompt if i < 7 else 1 // 0 for i, prompt in enumerate(PROMPTS)))
    dataset = write(toy, tmp_path / "dataset", batch_size=1)
    assert {shard["batch_size"] for shard in dataset.manifest["shards"]} == {1, 2}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_new_tokens": 3}, "Generate first"),
        ({"reduce": "mean"}, "reduces nothing"),
        ({"resume": "file"}, "leave resume out"),
        ({"device": "meta"}, "leave device out"),
    ],
)
def test_what_does_not_go_with_a_folder(toy, tmp_path, options, says):
    with pytest.raises(ValueError, match=says):
        write(toy, tmp_path / "dataset", **options)


def test_other_files_are_left_alone(toy, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"mine\.txt"):
        write(toy, tmp_path)
    with pytest.raises(FileExistsError, match="is a file"):
        write(toy, tmp_path / "mine.txt")
    assert contents(tmp_path) == {"mine.txt": b"mine"}


# -- damage ----------------------------------------------------------------------------------------------------------


def test_damage_is_named_and_written_anew(toy, tmp_path, whole):
    folder = tmp_path / "dataset"
    dataset = write(toy, folder)
    dataset.verify()
    flipped, short = (folder / "shards" / f"00000{k}.safetensors" for k in (1, 3))
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 1
    flipped.write_bytes(content)
    with pytest.raises(ValueError, match=r"000001\.safetensors is damaged: its checksum"):
        nnterp.ActivationDataset.open(folder).verify()
    short.write_bytes(short.read_bytes()[:-1])
    for touch in (lambda: nnterp.ActivationDataset.open(folder), lambda: write(toy, folder)):
        with pytest.raises(ValueError, match=r"000003\.safetensors is damaged"):
            touch()
    flipped.unlink(), short.unlink()
    with pytest.raises(FileNotFoundError, match=r"2 shards are gone \(000001"):
        nnterp.ActivationDataset.open(folder)
    assert len(nnterp.ActivationDataset.open(folder, partial=True)) == len(PROMPTS) - 6
    write(toy, folder)
    assert contents(folder) == whole
    (folder / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        nnterp.ActivationDataset.open(folder)
    with pytest.raises(FileNotFoundError, match="holds no dataset"):
        nnterp.ActivationDataset.open(tmp_path)


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0 or sys.platform != "linux",
    reason="mounting a small disk takes root on Linux",
)
def test_a_full_disk_leaves_what_was_written(toy, tmp_path, whole):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no small disk could be mounted: {mounted.stderr.decode().strip()}")
    try:
        with pytest.raises(OSError, match=r"No space left.*shards/00000\d\.safetensors could not be written"):
            write(toy, disk / "dataset")
        part = nnterp.ActivationDataset.open(disk / "dataset", partial=True)
        assert 3 <= len(part) < len(PROMPTS)
        part.verify()
        assert not [path for path in (disk / "dataset" / "shards").iterdir() if path.name.startswith(".")]
        subprocess.run(["mount", "-o", "remount,size=10m", str(disk)], check=True)
        write(toy, disk / "dataset")
        assert contents(disk / "dataset") == whole
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)  # what was read is still mapped
