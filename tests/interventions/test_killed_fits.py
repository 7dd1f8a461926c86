"""A fit in a process of its own that is killed with SIGKILL goes on from its checkpoint to the same lens."""

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
texts = [[(13 * i + 7 * j) % 190 + 5 for j in range(6 + i % 5)] for i in range(40)]
quiet = {"progress": False}
fits = {
    "tuned": lambda path: fit_tuned_lens(model, texts, epochs=10, patience=10, lr=3e-3, checkpoint=path, **quiet),
    "jacobian": lambda path: fit_jacobian_lens(model, texts, skip_first=1, max_tokens=24, checkpoint=path, **quiet),
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


def run(launcher, *words, seconds=None):
    """Run a fit, and kill it after some seconds; its exit code and how long it took."""
    print(*words, file=launcher.stdin, flush=True)
    pid, begin = int(launcher.stdout.readline()), time.perf_counter()
    if seconds is not None:
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
    return int(launcher.stdout.readline()), time.perf_counter() - begin


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform cannot fork")
@pytest.mark.parametrize("kind", ["tuned", "jacobian"])
def test_a_killed_fit_goes_on_to_the_same_lens(launcher, kind, tmp_path):
    code, lasts = run(launcher, kind, tmp_path, "whole")
    assert code == 0
    draw, file, went_on = random.Random(kind), tmp_path / "unfinished.safetensors", 0
    for _ in range(4):
        code, _ = run(launcher, kind, tmp_path, "kept", seconds=lasts * draw.uniform(0.1, 0.4))
        if code == 0 or (tmp_path / "kept.safetensors").exists():
            break
        assert code == -signal.SIGKILL
        went_on += file.exists()
    else:
        assert run(launcher, kind, tmp_path, "kept")[0] == 0
    assert went_on, "no kill came after a checkpoint"
    ours, theirs = (Lens.load(tmp_path / name) for name in ("kept", "whole"))
    assert ours.layers == theirs.layers
    for layer in theirs.layers:
        assert torch.equal(ours.weights[layer], theirs.weights[layer])
        assert layer not in theirs.biases or torch.equal(ours.biases[layer], theirs.biases[layer])
    assert ours.report == theirs.report
    assert not file.exists()
