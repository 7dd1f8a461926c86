"""What every test needs: no network, one thread a worker, models built once a worker, no proofs of an earlier run."""

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["NNTERP_CACHE"] = "off"

from functools import cache

import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_finish(session):
    """What the imports made stays: the collector need not walk it again and again during the tests."""
    gc.collect()
    gc.freeze()


def pytest_xdist_make_scheduler(config, log):
    """Under `-n`, tests of one model type run in one process, so that its model is built and proven once."""
    from xdist.scheduler import LoadScopeScheduling

    from nnterp.testing import model_types

    types = set(model_types())

    class ByModelType(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file, _, test = nodeid.partition("::")
            if "packaging" in file:
                return nodeid
            parameters = test.partition("[")[2].rstrip("]").split("-")
            return next((name for name in parameters if name in types), file)

    return ByModelType(config, log) if config.getoption("dist") == "load" else None


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
def _real(name: str, **options):
    import os
    from pathlib import Path

    import nnterp

    folder = Path(os.environ.get("NNTERP_REAL_MODELS", "~/.cache/nnterp/real-models")).expanduser() / name
    if not folder.exists():
        pytest.skip(f"{folder} is not there: make it with `uv run --with gguf python tools/real_models.py {name}`")
    model = nnterp.StandardizedTransformer(str(folder), **options)
    model.dispatch()
    return model


@pytest.fixture
def real():
    """`real("smollm2")`, `real("gemma3")`: a small trained model, loaded once a worker for each set of options of
    `StandardizedTransformer`; skips where it was not made."""
    return _real
