"""What is saved is there whole or not at all: killed, on a full disk, with a record that cannot be written."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch

from nnterp.collection import Collected
from nnterp.files import read_tensors, write_tensors
from nnterp.interventions import Result

A = {"x": torch.arange(12.0).reshape(3, 4), "y": torch.tensor([], dtype=torch.int64)}
B = {"x": torch.zeros(2), "z": torch.ones(3, dtype=torch.bfloat16)}


def equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


@pytest.mark.parametrize("name", ["file", "file.safetensors", "file.json", "with.dots", "deep/er/file"])
def test_what_was_written_is_read(tmp_path, name):
    path = write_tensors(tmp_path / name, A, {"label": "ä", "n": [1, 2]}, "thing")
    assert path.suffix == ".safetensors"
    tensors, record = read_tensors(tmp_path / name, "thing")
    equal(tensors, A)
    assert record == {"label": "ä", "n": [1, 2]}
    assert os.listdir(path.parent) == [path.name]


def test_a_record_that_cannot_be_written_leaves_what_was_there(tmp_path):
    write_tensors(tmp_path / "file", A, {"n": 1}, "thing")
    with pytest.raises(TypeError):
        write_tensors(tmp_path / "file", B, {"n": object()}, "thing")
    tensors, record = read_tensors(tmp_path / "file", "thing")
    equal(tensors, A)
    assert record == {"n": 1}


@pytest.mark.parametrize("content", [b"", b"not a tensor", b"\x10\x00\x00\x00\x00\x00\x00\x00garbage"])
def test_a_foreign_file_is_named_and_stays(tmp_path, content):
    path = tmp_path / "mine.safetensors"
    path.write_bytes(content)
    with pytest.raises(FileExistsError, match=r"mine\.safetensors"):
        write_tensors(path, A, {}, "thing")
    with pytest.raises(ValueError, match=r"mine\.safetensors"):
        read_tensors(path, "thing")
    assert path.read_bytes() == content


def test_another_kind_is_refused(tmp_path):
    write_tensors(tmp_path / "file", A, {}, "thing")
    with pytest.raises(ValueError, match="it is thing"):
        read_tensors(tmp_path / "file", "other")
    with pytest.raises(FileExistsError):
        write_tensors(tmp_path / "file", B, {}, "other")


def test_damage_is_found(tmp_path):
    path = write_tensors(tmp_path / "file", A, {"n": 1}, "thing")
    whole = path.read_bytes()
    for cut in (5, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"file\.safetensors"):
            read_tensors(path, "thing")
    path.write_bytes(whole[:-3] + b"\x01\x02\x03")
    with pytest.raises(ValueError, match="damaged"):
        read_tensors(path, "thing")


def test_a_killed_write_leaves_the_old_or_the_new(processes, tmp_path):
    path = tmp_path / "file.safetensors"
    size = 4_000_000
    write_tensors(path, {"x": torch.zeros(size)}, {"n": 0}, "thing")
    program = textwrap.dedent(f"""
        import torch
        from nnterp.files import write_tensors
        print("ready", flush=True)
        n = 0
        while True:
            n += 1
            write_tensors({str(path)!r}, {{"x": torch.full(({size},), float(n))}}, {{"n": n}}, "thing")
    """)
    for wait in (0.02, 0.06, 0.11):
        with processes.running(program) as child:
            assert child.stdout.readline() == "ready\n", child.said
            time.sleep(wait)
            child.send(signal.SIGKILL)
            assert child.wait() == -signal.SIGKILL
        tensors, record = read_tensors(path, "thing")
        assert bool((tensors["x"] == record["n"]).all())


@pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="mounting a small disk takes root on Linux")
def test_a_full_disk_leaves_what_was_there(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no small disk could be mounted: {mounted.stderr.decode().strip()}")
    try:
        write_tensors(disk / "file", A, {"n": 1}, "thing")
        with pytest.raises(OSError, match=r"file|space"):
            write_tensors(disk / "file", {"x": torch.zeros(1_000_000)}, {"n": 2}, "thing")
        tensors, record = read_tensors(disk / "file", "thing")
        equal(tensors, A)
        assert record == {"n": 1}
        assert os.listdir(disk) == ["file.safetensors"]
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)  # what was read is still mapped


def test_results_are_saved_so(tmp_path):
    def result(value, model, **more):
        about = {"model": model, **more}
        return Result({"x": torch.full((10,), value)}, {"x": ("a",)}, {"a": tuple(range(10))}, about=about)

    result(1.0, "A").save(tmp_path / "q")
    with pytest.raises(TypeError):
        result(2.0, "B", broken=object()).save(tmp_path / "q")
    again = Result.load(tmp_path / "q")
    assert again.about == {"model": "A"}
    assert again["x"][0] == 1.0


def test_collected_is_saved_and_loaded(tmp_path, tiny):
    model = tiny("llama")
    prompts = ["The capital of France is", "A cat", [5, 6, 7]]
    found = model.collect(prompts, ["layers_output", "mlp_neurons[1]"], layers=[0, -1])
    found.save(tmp_path / "acts")
    again = Collected.load(tmp_path / "acts")
    assert again.rows == found.rows
    assert (again.layers, again.positions, again.done) == (found.layers, found.positions, found.done)
    assert torch.equal(again.mask, found.mask)
    for key in ("layers_output", ("layers_output", -1), "mlp_neurons[1]"):
        assert torch.equal(again[key], found[key])
    ragged = tiny("laguna").collect(prompts, "attention_head_outputs")  # layers of different shapes
    assert isinstance(ragged.tensors["attention_head_outputs"], dict)
    ragged.save(tmp_path / "ragged")
    assert torch.equal(
        Collected.load(tmp_path / "ragged")["attention_head_outputs", 2], ragged["attention_head_outputs", 2]
    )
