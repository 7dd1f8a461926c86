"""`RemoteWorker`, a stand-in for a remote service: it runs requests in a process without the client's libraries."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType, TracebackType
from typing import IO, Any
from unittest import mock

import torch
from nnsight.intervention.backends.remote import RemoteError
from nnsight.intervention.serialization import CustomCloudPickler
from nnsight.modeling.mixins.remotable import Remotable
from nnsight.ndif import pull_env
from nnsight.schema.request import RequestModel
from nnsight.tracing.backend import Backend
from nnsight.tracing.tracer import save
from nnsight.tracing.util import push

from ._worker import read, write


@dataclass(frozen=True)
class Request:
    """The size of one request, and the functions in it that were not sent as source.

    Attributes:
        size: Bytes sent, after nnsight's compression.
        bytecode: Names of the functions that were sent as bytecode, because they have no source. A worker with another
            version of Python cannot run them.

    Example:
        request = testing.Request(size=27_000, bytecode=())
        print(request.size)  # → 27000
    """

    size: int
    bytecode: tuple[str, ...]


class RemoteWorker:
    """A child process that serves one checkpoint as a remote service would: it has nnsight and the model, nothing else.

    The traced block is serialised as for a real request. The child cannot import the packages in `blocked`, so whatever
    the block needs of them must be in the request. Only what the block saved comes back.

    Args:
        folder: The checkpoint, with its tokenizer.
        blocked: Top-level packages that the worker cannot import.

    Attributes:
        requests: One `Request` for each request that was sent.

    Raises:
        RuntimeError: The worker could not load the checkpoint, or it died. Raised by the first request that notices,
            with what the worker printed.
        nnsight.intervention.backends.remote.RemoteError: A request failed on the worker. Raised by that request, with
            the worker's traceback.

    Example:
        distant = StandardizedTransformer(nnterp.toy_checkpoint(), remote=True)
        with testing.RemoteWorker(nnterp.toy_checkpoint()) as worker, worker.serving():
            with torch.no_grad(), distant.trace("The Eiffel Tower is in", remote=True):
                last = distant.layers_output[-1][:, -1].save()
        print(worker.requests[-1].bytecode)  # → ()
    """

    def __init__(self, folder: str | Path, blocked: Sequence[str] = ("nnterp",)) -> None:
        self.requests: list[Request] = []
        self._said: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
        script = Path(__file__).with_name("_worker.py")
        self._process = subprocess.Popen(
            [sys.executable, "-I", str(script), str(folder), ",".join(blocked)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        self._ready = False

    def __enter__(self) -> RemoteWorker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._said.close()

    @property
    def backend(self) -> Backend:
        """A backend for one trace: `model.trace(..., backend=worker.backend)`."""
        return _Strict(self)

    @contextlib.contextmanager
    def serving(self) -> Iterator[RemoteWorker]:
        """Inside this block, the worker answers every `remote=True` instead of the real service.

        Raises:
            ValueError: A trace asks for `remote="local"` or `blocking=False`.
        """

        def backend(model: Remotable, remote: Any, blocking: bool, job_id: str | None, verbose: bool) -> Backend:
            if remote == "local" or not blocking:
                raise ValueError("RemoteWorker answers remote=True, blocking=True.")
            return _Strict(self, model)

        with mock.patch.object(Remotable, "_remote_backend", backend):
            yield self

    def answer(self, blob: bytes, env: dict[str, Any]) -> dict[str, Any]:
        """Run one serialised request on the worker and return what its block saved, by variable name.

        Raises:
            RemoteError: The request failed on the worker.
            RuntimeError: The worker did not start, or it died.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if not self._ready:
            if read(self._process.stdout) != b"ready":
                raise RuntimeError(f"The worker did not start:\n{self._printed()}")
            self._ready = True
        for message in (json.dumps(env).encode(), blob):
            write(self._process.stdin, message)
        result = read(self._process.stdout)
        if result is None:
            raise RuntimeError(f"The worker died:\n{self._printed()}")
        answer = torch.load(io.BytesIO(result), weights_only=False)
        if "error" in answer:
            raise RemoteError(answer["error"])
        return answer["saved"]

    def _printed(self) -> str:
        self._said.seek(0)
        return self._said.read().decode(errors="replace")[-4000:]


class _Strict(Backend):
    """Sends a traced block to a worker and puts what it saved into the caller's variables."""

    def __init__(self, worker: RemoteWorker, model: Any = None) -> None:
        self.worker, self.model = worker, model

    def __call__(self, tracer: Any) -> None:
        pull_env()
        with _bytecode_seen() as bytecode:
            blob = RequestModel.serialize(tracer, compress=True)
        self.worker.requests.append(Request(len(blob), tuple(bytecode)))
        model = self.model if self.model is not None else tracer.envoy
        saved = self.worker.answer(blob, model._remoteable_get_env())
        for value in saved.values():
            save(value)
        push(tracer.info.frame, saved)


@contextlib.contextmanager
def _bytecode_seen() -> Iterator[list[str]]:
    """Collect the names of the functions that are serialised as bytecode inside the block."""
    seen: list[str] = []
    pickler: Any = CustomCloudPickler.__base__  # nnsight falls back on it if a function has no source
    reduce = pickler._dynamic_function_reduce

    def noted(self: Any, function: FunctionType) -> Any:
        seen.append(f"{function.__module__}.{function.__qualname__}")
        return reduce(self, function)

    with mock.patch.object(pickler, "_dynamic_function_reduce", noted):
        yield seen
