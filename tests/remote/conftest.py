"""A model that is only here in name, and a worker that has its weights and not this library."""

import functools
import inspect
from dataclasses import dataclass
from types import SimpleNamespace
from unittest import mock

import pytest
from nnsight.intervention import serialization

from nnterp import StandardizedTransformer
from nnterp.testing import RemoteWorker, tiny_checkpoint

TYPES = ("gpt2", "llama", "jamba")
PARSERS = ("_lambda_source", "_referenced_names", "_function_referenced_names")


@dataclass
class Pair:
    """The same checkpoint here, and there."""

    here: StandardizedTransformer
    there: StandardizedTransformer
    worker: RemoteWorker
    folder: str


@pytest.fixture(scope="session", autouse=True)
def _sources_are_read_once():
    """nnsight reads and parses the source of every function of a request anew, which is most of a request's cost."""
    read = {name: functools.cache(getattr(inspect, name)) for name in ("getsource", "getsourcelines")}
    parse = {name: functools.cache(getattr(serialization, name)) for name in PARSERS}
    with (
        mock.patch.object(serialization, "inspect", SimpleNamespace(**{**vars(inspect), **read})),
        mock.patch.multiple(serialization, **parse),
    ):
        yield


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """`pairs("llama")`: built once a test process, each with a worker of its own."""
    made: dict[str, Pair] = {}

    @functools.cache
    def pair(model_type: str, eager: bool = True) -> Pair:
        folder = str(tiny_checkpoint(model_type, tmp_path_factory.mktemp(model_type)))
        worker = RemoteWorker(folder)
        here = StandardizedTransformer(folder, enable_attention_probs=eager)
        there = StandardizedTransformer(folder, remote=True, enable_attention_probs=eager)
        made[model_type] = Pair(here, there, worker, folder)
        return made[model_type]

    yield pair
    for one in made.values():
        one.worker.close()


@pytest.fixture(params=TYPES)
def pair(request, pairs):
    """The pair of each of the types, its worker answering every `remote=True`; no weights are here when it is done."""
    one = pairs(request.param)
    with one.worker.serving():
        yield one
    assert not one.there.dispatched
    assert all(p.device.type == "meta" for p in one.there._module.parameters())
