"""A fit in a process of its own that is killed with SIGKILL goes on from its checkpoint to the same lens."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

from nnterp.interventions import Lens

# Imports once, and forks a process for each line "kind, folder, name" that it reads: starting anew takes seconds.
LAUNCHER = """
import os
import sys
from pathlib import Path

import torch

torch.set_num_threads(1)
from nnterp import StandardizedTransformer
from nnterp.interventions import fit_jacobian_lens, fit_tuned_lens
from nnterp.testing import tiny_model, tiny_tokenizer

model = StandardizedTransformer(tiny_model("llama"), tokenizer=tiny_tokenizer())
model.prepare()
texts = [[(13 * i + 7 * j) % 190 + 5 for j in range(6 + i % 5)] for i in range(24)]
quiet = {"progress": False}
fits = {
    "tuned": lambda path: fit_tuned_lens(model, texts, epochs=10, patience=10, lr=3e-3, checkpoint=path, **quiet),
    "jacobian": lambda path: fit_jacobian_lens(model, texts, skip_first=1, max_tokens=40, checkpoint=path, **quiet),
}
for line in sys.stdin:
    kind, folder, name = line.split()
    pid = os.fork()
    if not pid:
        fits[kind](Path(folder) / "unfinished" if name == "kept" else None).save(Path(folder) / name)
        os._exit(0)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def launcher():
    with subprocess.Popen(
        [sys.executable, "-c", LAUNCHER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        process.stdin.close()


def run(launcher, *words, file=None, writes=0, seconds=0.0):
    """Run a fit; with `file`, kill it some seconds after it has written it so many times. Its exit code."""
    before = written(file)
    print(*words, file=launcher.stdin, flush=True)
    pid = int(launcher.stdout.readline())
    with contextlib.suppress(ProcessLookupError):  # it has ended by itself
        while file is not None and writes:
            os.kill(pid, 0)
            time.sleep(0.002)
            if written(file) != before:
                before, writes = written(file), writes - 1
        if file is not None:
            time.sleep(seconds)
            os.kill(pid, signal.SIGKILL)
    return int(launcher.stdout.readline())


def written(file):
    return file.stat().st_mtime_ns if file is not None and file.exists() else None


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform cannot fork")
@pytest.mark.parametrize("kind", ["tuned", "jacobian"])
def test_a_killed_fit_goes_on_to_the_same_lens(launcher, kind, tmp_path):
    assert run(launcher, kind, tmp_path, "whole") == 0
    draw, file = random.Random(kind), tmp_path / "unfinished.safetensors"
    for _ in range(3):
        moment = {"writes": draw.randint(1, 1 + (kind == "tuned")), "seconds": draw.uniform(0, 0.05)}
        assert run(launcher, kind, tmp_path, "kept", file=file, **moment) == -signal.SIGKILL
        assert file.exists()
        assert not (tmp_path / "kept.safetensors").exists()
    assert run(launcher, kind, tmp_path, "kept") == 0
    ours, theirs = (Lens.load(tmp_path / name) for name in ("kept", "whole"))
    assert ours.layers == theirs.layers
    for layer in theirs.layers:
        assert torch.equal(ours.weights[layer], theirs.weights[layer])
        assert layer not in theirs.biases or torch.equal(ours.biases[layer], theirs.biases[layer])
    assert ours.report == theirs.report
    assert not file.exists()
