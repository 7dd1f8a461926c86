"""One engine a process: `run.py` makes the checkpoints and their references, and runs these tests once for each."""

import json
import os
from contextlib import nullcontext
from importlib.util import find_spec
from unittest import mock

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

    options = {"dtype": "float32", **json.loads(os.environ.get("NNTERP_VLLM_OPTIONS", "{}"))}
    return StandardizedVLLM(folder, max_model_len=128, max_num_seqs=32, **options)


@pytest.fixture(scope="session", autouse=True)
def _forked_huggingface(request):
    """`run.py` runs what `validate()` compares with, which saves the seconds that importing torch takes."""
    given = getattr(request.config, "huggingface", None)
    with mock.patch("nnterp.vllm._validate._reference", given) if given else nullcontext():
        yield


@pytest.fixture
def on_the_toy():
    """Tests of what does not depend on the model run on one of them."""
    if os.environ["NNTERP_VLLM_NAME"] != "toy":
        pytest.skip("it does not depend on the model")
