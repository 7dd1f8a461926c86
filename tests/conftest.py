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
