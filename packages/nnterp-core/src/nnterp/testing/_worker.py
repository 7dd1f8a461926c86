"""The child process of `RemoteWorker`. It has nnsight and the plain model, and none of the client's libraries.

Run as a script: `_worker.py FOLDER BLOCKED`. It reads requests from its standard input and writes answers to its
standard output. Each message is its length, in eight bytes, and then that many bytes.
"""

from __future__ import annotations

import io
import json
import os
import struct
import sys
import traceback
from typing import IO, Any


class Blocker:
    """An import finder that refuses the packages a remote worker does not have."""

    def __init__(self, packages: list[str]) -> None:
        self.packages = packages

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        """Raise `ModuleNotFoundError` for a blocked package; otherwise leave the import to the next finder."""
        if name.split(".")[0] in self.packages:
            raise ModuleNotFoundError(f"No module named {name!r} (the worker does not have it)", name=name)


def read(stream: IO[bytes]) -> bytes | None:
    """The next message; None if the client is gone."""
    header = stream.read(8)
    return stream.read(struct.unpack(">Q", header)[0]) if len(header) == 8 else None


def write(stream: IO[bytes], message: bytes) -> None:
    """Send a message."""
    stream.write(struct.pack(">Q", len(message)) + message)
    stream.flush()


def answer(model: Any, blob: bytes, env: dict[str, Any]) -> dict[str, Any]:
    """Run one request. Returns `{"saved": values by name}`, or `{"error": traceback}` if it failed."""
    from nnsight.schema.request import RequestModel
    from nnsight.tracing.globals import BLOCKS, SOURCES
    from nnsight.tracing.tracer import _saves, dec, inc

    for remembered in (BLOCKS, SOURCES):  # nnsight caches the lines of a file, but each request brings its own
        remembered.clear()
    try:
        tracer = RequestModel.deserialize(blob, model._remoteable_persistent_objects(), compress=True)
        model._remoteable_set_env(env)
        inc()
        try:
            frame = tracer.info.frame
            tracer.execute(tracer.info.code)
            return {"saved": {name: value for name, value in frame.f_locals.items() if id(value) in _saves()}}
        finally:
            dec()
    except BaseException as error:
        own = os.path.dirname(os.path.abspath(__file__))
        frames = [f for f in traceback.extract_tb(error.__traceback__) if not _is_machinery(f.filename, own)]
        lines = ["Traceback (most recent call last):\n", *traceback.format_list(frames)]
        return {"error": "".join([*lines, *traceback.format_exception_only(error)]).rstrip()}


def _is_machinery(filename: str, own: str) -> bool:
    """Whether a frame of a traceback belongs to this worker or to nnsight, and not to the user's block."""
    return not filename.startswith("[") and (filename.startswith(own) or "/nnsight/" in filename)


def main() -> None:
    """Load the model, send "ready", and answer requests until the client is gone."""
    folder, blocked = sys.argv[1:3]
    sys.meta_path.insert(0, Blocker(blocked.split(",")))  # type: ignore[arg-type]
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # so that what a user's block prints is not read as an answer

    import torch
    from nnsight import TransformersModel
    from transformers import AutoTokenizer

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = TransformersModel(folder, task="text-generation", tokenizer=tokenizer, dispatch=True)
    write(answers, b"ready")
    while (header := read(requests)) is not None:
        blob = read(requests)
        assert blob is not None
        buffer = io.BytesIO()
        torch.save(answer(model, blob, json.loads(header)), buffer)
        write(answers, buffer.getvalue())


if __name__ == "__main__":
    main()
