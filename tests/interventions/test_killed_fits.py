"""A fit in a process of its own that is killed with SIGKILL goes on from its checkpoint to the same lens."""

import random
import signal
import subprocess
import sys
import time

import pytest
import torch

from nnterp.interventions import Lens

CHILD = """
import sys
from pathlib import Path

import torch

torch.set_num_threads(1)
from nnterp import StandardizedTransformer
from nnterp.interventions import fit_jacobian_lens, fit_tuned_lens
from nnterp.testing import tiny_model, tiny_tokenizer

folder = Path(sys.argv[1])
model = StandardizedTransformer(tiny_model("llama"), tokenizer=tiny_tokenizer())
model.prepare()
texts = [[(13 * i + 7 * j) % 190 + 5 for j in range(6 + i % 5)] for i in range(60)]
texts = list(map(list, dict.fromkeys(map(tuple, texts))))
fits = {
    "tuned": lambda path: fit_tuned_lens(
        model, texts, epochs=25, patience=25, lr=3e-3, progress=False, checkpoint=path
    ),
    "jacobian": lambda path: fit_jacobian_lens(
        model, texts, skip_first=1, max_tokens=12, progress=False, checkpoint=path
    ),
}
print("begun", flush=True)
fits[sys.argv[2]](folder / "unfinished" if sys.argv[3] == "kept" else None).save(folder / f"{sys.argv[3]}")
"""


def child(folder, kind, name):
    return subprocess.Popen([sys.executable, "-c", CHILD, str(folder), kind, name], stdout=subprocess.PIPE, text=True)


def begun(process):
    assert process.stdout.readline() == "begun\n"
    return time.perf_counter()


@pytest.mark.parametrize("kind", ["tuned", "jacobian"])
def test_a_killed_fit_goes_on_to_the_same_lens(kind, tmp_path):
    whole = child(tmp_path, kind, "whole")
    begin = begun(whole)
    assert whole.wait() == 0
    lasts, draw, killed, file = time.perf_counter() - begin, random.Random(kind), 0, tmp_path / "unfinished.safetensors"
    for _ in range(3):
        process = child(tmp_path, kind, "kept")
        begun(process)
        time.sleep(lasts * draw.uniform(0.1, 0.35))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            killed += process.wait() == -signal.SIGKILL
    assert killed >= 2
    assert file.exists(), "no kill came after the first checkpoint"
    process = child(tmp_path, kind, "kept")
    begun(process)
    assert process.wait() == 0
    ours, theirs = (Lens.load(tmp_path / name) for name in ("kept", "whole"))
    assert ours.layers == theirs.layers
    for layer in theirs.layers:
        assert torch.equal(ours.weights[layer], theirs.weights[layer])
    assert all(torch.equal(ours.biases[layer], theirs.biases[layer]) for layer in theirs.biases)
    assert ours.report == theirs.report
    assert not file.exists()
