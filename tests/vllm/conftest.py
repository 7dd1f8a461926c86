"""One engine a process: `run.py` makes the checkpoints and their references, and runs these tests once for each."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

collect_ignore_glob = ["test_*.py"] if find_spec("vllm") is None or "NNTERP_VLLM_MODEL" not in os.environ else []


@pytest.fixture(scope="session")
def folder():
    """The checkpoint that this process is about."""
    return os.environ["NNTERP_VLLM_MODEL"]


@pytest.fixture(scope="session")
def reference(folder, tmp_path_factory):
    """HuggingFace's numbers of it, from a process of its own."""
    import torch

    out = tmp_path_factory.mktemp("reference") / "numbers.pt"
    program = Path(__file__).with_name("reference.py")
    done = subprocess.run([sys.executable, program, folder, out], capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    return torch.load(out)


@pytest.fixture(scope="session")
def model(folder, reference):
    """The checkpoint in vLLM."""
    from nnterp.vllm import StandardizedVLLM

    return StandardizedVLLM(folder, dtype="float32", max_model_len=128)
