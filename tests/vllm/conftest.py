"""One engine a process: `run.py` makes the checkpoints and their references, and runs these tests once for each."""

import json
import os
from importlib.util import find_spec

import pytest

collect_ignore_glob = ["test_*.py"] if find_spec("vllm") is None or "NNTERP_VLLM_MODEL" not in os.environ else []


@pytest.fixture(scope="session")
def folder():
    """The checkpoint that this process is about."""
    return os.environ["NNTERP_VLLM_MODEL"]


@pytest.fixture(scope="session")
def reference():
    """HuggingFace's numbers of it, which `run.py` made in a process of its own."""
    import torch

    return torch.load(os.environ["NNTERP_VLLM_REFERENCE"])


@pytest.fixture(scope="session")
def model(folder):
    """The checkpoint in vLLM."""
    from nnterp.vllm import StandardizedVLLM

    options = json.loads(os.environ.get("NNTERP_VLLM_OPTIONS", "{}"))
    return StandardizedVLLM(folder, dtype="float32", max_model_len=128, max_num_seqs=32, **options)


@pytest.fixture
def on_the_toy():
    """Tests of what does not depend on the model run on one of them."""
    if os.environ["NNTERP_VLLM_NAME"] != "toy":
        pytest.skip("it does not depend on the model")
