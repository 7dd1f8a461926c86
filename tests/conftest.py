"""What every test needs: no network, one thread a worker, models built once a worker."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from functools import cache

import pytest
import torch

torch.set_num_threads(1)


@cache
def _tiny(model_type: str):
    from nnterp import StandardizedTransformer
    from nnterp.testing import tiny_model, tiny_tokenizer

    return StandardizedTransformer(tiny_model(model_type), tokenizer=tiny_tokenizer())


@pytest.fixture
def tiny():
    """`tiny("llama")`: a StandardizedTransformer over a tiny random model, shared by the tests of one worker."""
    return _tiny


@cache
def _toy():
    import nnterp

    model = nnterp.StandardizedTransformer(nnterp.toy_checkpoint())
    model.dispatch()
    return model


@pytest.fixture
def toy():
    """The trained toy checkpoint, loaded once a worker."""
    return _toy()


@cache
def _real(name: str):
    import os
    from pathlib import Path

    import nnterp

    folder = Path(os.environ.get("NNTERP_REAL_MODELS", "~/.cache/nnterp/real-models")).expanduser() / name
    if not folder.exists():
        pytest.skip(f"{folder} is not there: make it with `uv run --with gguf python tools/real_models.py {name}`")
    model = nnterp.StandardizedTransformer(str(folder))
    model.dispatch()
    return model


@pytest.fixture
def real():
    """`real("smollm2")`, `real("gemma3")`: a small trained model, loaded once a worker; skips where it was not made."""
    return _real
