"""Tensors and a JSON record in one folder: `scores.safetensors` and `run.json`."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

_TENSORS, _RECORD = "scores.safetensors", "run.json"
_VERSION = 1


def write(folder: str | Path, tensors: Mapping[str, torch.Tensor], record: Mapping[str, Any]) -> None:
    """Write tensors and a record to a folder, which is made if it does not exist.

    Each file is replaced as a whole: a reader finds the old one or the new one, never a part.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # The record does not change during a run, so a checkpoint that is cut short between the two files can be read.
    text = json.dumps({"version": _VERSION, **record}, indent=1, ensure_ascii=False, default=_plain).encode()
    _replace(folder / _RECORD, text)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    _replace(folder / _TENSORS, save_tensors(contiguous, metadata={"run": hashlib.sha256(text).hexdigest()}))


def read(folder: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the tensors and the record that `write` wrote to a folder.

    Raises:
        FileNotFoundError: They are not there.
        ValueError: The two files are not from one call of `write`, or another version of this package wrote them.
    """
    folder = Path(folder)
    if not exists(folder):
        raise FileNotFoundError(f"{folder} holds no results: {_TENSORS} and {_RECORD} were expected in it.")
    text, data = (folder / _RECORD).read_bytes(), (folder / _TENSORS).read_bytes()
    if _metadata(data).get("run") != hashlib.sha256(text).hexdigest():
        raise ValueError(f"{folder}: {_TENSORS} and {_RECORD} are not of one run, or one was changed by hand.")
    record = json.loads(text)
    if record["version"] != _VERSION:
        raise ValueError(f"{folder / _RECORD} has version {record['version']}; this package reads version {_VERSION}.")
    return load_tensors(data), record


def exists(folder: str | Path) -> bool:
    """Return True if both files are in a folder."""
    return (Path(folder) / _TENSORS).is_file() and (Path(folder) / _RECORD).is_file()


def _metadata(data: bytes) -> dict[str, str]:
    """Return the metadata of a safetensors file, whose JSON header follows 8 bytes that give its length."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]).get("__metadata__", {})


def _replace(path: Path, data: bytes) -> None:
    """Write a file under another name, then rename it."""
    draft = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        draft.write_bytes(data)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def _plain(value: Any) -> Any:
    """Turn what JSON does not know into a number (NumPy's) or a text (everything else)."""
    return value.item() if hasattr(value, "item") else str(value)
