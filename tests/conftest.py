"""What every test needs: no network, one thread a worker, models built once a worker, no proofs of an earlier run."""

import gc
import os
import re

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["NNTERP_CACHE"] = "off"
# Before numpy is loaded, and for child processes too: scikit-learn's fits took eight times as long in several threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

from functools import cache
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from packaging.version import Version

torch.set_num_threads(1)


gc.disable()  # while modules are imported and tests collected, nothing is thrown away


def pytest_collection_finish(session):
    """What the imports made stays: the collector need not walk it again and again during the tests.

    It took a tenth of their time. What a test leaves behind in circles is found after more objects than by default.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)
    gc.enable()


# One model type for each way of building a model. Without the slow tests, a test that is repeated over model types runs
# on these of them, or on its first if it is of other types.
BUILDS = frozenset("gpt2 llama gemma2 mixtral opt bloom falcon mamba jamba deepseek_v3 qwen3_next bert llava".split())


def pytest_collection_modifyitems(items):
    """Repeats of a test on model types beside `BUILDS` are slow; if all its types are others, those after its first."""
    from nnterp.testing import model_types, multimodal_model_types

    known = {*model_types(), *multimodal_model_types()}
    repeats = {}
    for item in items:
        given = item.callspec.params.values() if hasattr(item, "callspec") else ()
        for name in dict.fromkeys(value for value in given if isinstance(value, str) and value in known):
            repeats.setdefault((item.path, item.originalname), {}).setdefault(name, []).append(item)
    for by_type in repeats.values():
        for name in by_type.keys() - (by_type.keys() & BUILDS or {next(iter(by_type))}):
            for item in by_type[name]:
                item.add_marker(pytest.mark.slow)


def transformers_is_older() -> bool:
    """Whether the installed transformers is older than the one that the tests are written for."""
    lock = (Path(__file__).parents[1] / "requirements.lock").read_text(encoding="utf-8")
    pinned = re.search(r"^transformers==([\d.]+)", lock, flags=re.MULTILINE)
    return Version(version("transformers")) < Version(pinned[1])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call():
    """A test of a model type that an older transformers does not have yet is skipped there (tools/versions.py)."""
    try:
        return (yield)
    except KeyError as error:
        if "is not a causal LM of the installed transformers" in str(error) and transformers_is_older():
            pytest.skip(str(error))
        raise


# Folders whose tests share what is slow to make: built wheels with compiled bytecode, workers.
TOGETHER = ("packaging/", "remote/")
# The trained models: each is loaded and proven in one process.
TRAINED = ("smollm2", "gemma3")
# Files with few tests that are long: run first, so that no process ends long before the others.
LONG = (*TOGETHER, "test_browser", "test_readme", "test_probe", "_real", "test_toy", "test_saved_whole")


def pytest_xdist_make_scheduler(config, log):
    """Under `-n`, tests of one model type run in one process, so that its model is built and proven once."""
    from xdist.scheduler import LoadScopeScheduling

    gc.enable()  # nothing is collected in this process

    from nnterp.testing import model_types, multimodal_model_types

    types = {*TRAINED, *model_types(), *multimodal_model_types()}
    types = sorted(types, key=len, reverse=True)  # xlm-roberta before xlm

    class ByModelType(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file, _, test = nodeid.partition("::")
            together = next((folder for folder in TOGETHER if folder in file), None)
            if together is not None:
                return together
            function, _, parameters = test.partition("[")
            trained = next((name for name in TRAINED if f"_{name}_" in f"{function}_"), None)
            parameters = f"-{parameters.rstrip(']')}-"
            return trained or next((name for name in types if f"-{name}-" in parameters), file)

        def _assign_work_unit(self, node):
            long = next((s for s in self.workqueue if s in TRAINED or any(name in s for name in LONG)), None)
            if long is not None:
                self.workqueue.move_to_end(long, last=False)
            super()._assign_work_unit(node)

    return ByModelType(config, log) if config.getoption("dist") == "load" else None


@pytest.fixture(scope="session")
def processes():
    """`processes.run(program)`: runs it in a process of its own, without the seconds that importing torch takes."""
    from .processes import Launcher

    launcher = Launcher()
    yield launcher
    launcher.close()


@pytest.fixture
def keep_proofs(monkeypatch, tmp_path_factory):
    """Proofs are kept as a user's are: a checkpoint that several tests with this fixture load is proven once."""
    monkeypatch.setenv("NNTERP_CACHE", str(tmp_path_factory.getbasetemp() / "proofs"))


@pytest.fixture
def tiny():
    """`tiny("llama")`: a StandardizedTransformer over a tiny random model, shared by the tests of one worker."""
    from . import models

    return models.tiny


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
