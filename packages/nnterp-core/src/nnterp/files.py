"""Files that are written whole or not at all; above all, tensors and a record of what they are."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from nnterp.arguments import path_of

_KIND, _RECORD, _SUM = "nnterp", "record", "sha256"


def write_tensors(path: str | Path, tensors: Mapping[str, torch.Tensor], record: Mapping[str, Any], kind: str) -> Path:
    """Write tensors with a record to a safetensors file; folders are made.

    A write that is cut short or fails leaves what was there before: the file is written beside its place and then moved
    there in one step.

    Args:
        path: The file; `.safetensors` is added where it is missing.
        tensors: Tensors by name.
        record: Anything that JSON can hold.
        kind: What the file holds, "collected" or "result": `read_tensors` asks for it.

    Returns:
        The path of the file.

    Raises:
        TypeError, ValueError: JSON cannot hold the record; nothing is written.
        FileExistsError: The file exists and was not written by this function as the same kind; it stays.
        OSError: The folder cannot be made, or the disk is full; what was there stays.
    """
    path = tensors_path(path)
    text = json.dumps(record, ensure_ascii=False)
    contents = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    if path.exists() and _marks(path).get(_KIND) != kind:
        raise FileExistsError(
            f"{path} exists and holds no {kind} of nnterp. It is not overwritten: choose another name."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        save_file(contents, draft, metadata={_KIND: kind, _RECORD: text, _SUM: _checksum(text, contents)})
        with draft.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(draft, path)
    except SafetensorError as error:
        raise OSError(f"{path} could not be written: {error}") from error
    finally:
        draft.unlink(missing_ok=True)
    return path


def read_tensors(path: str | Path, kind: str) -> tuple[dict[str, torch.Tensor], Any]:
    """Return the tensors and the record that `write_tensors` wrote.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is truncated, damaged, or something else than asked for; names it.
    """
    path = tensors_path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    marks = _marks(path)
    if marks.get(_KIND) != kind or _RECORD not in marks:
        raise ValueError(f"{path} holds no {kind} of nnterp: it is {marks.get(_KIND) or 'another file, or damaged'}.")
    try:
        tensors = load_file(path)
    except (SafetensorError, ValueError, OSError, RuntimeError) as error:  # or replaced while it was opened
        raise ValueError(f"{path} is truncated or damaged ({error}).") from error
    if marks.get(_SUM) != _checksum(marks[_RECORD], tensors):
        raise ValueError(f"{path} is damaged: its contents are not those that were written.")
    try:
        return tensors, json.loads(marks[_RECORD])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: its record is no JSON ({error!s:.200}).") from error


def write_whole(path: str | Path, content: bytes) -> None:
    """Write a file at once: a write that fails or is killed leaves what was there before. Folders are made.

    Raises:
        OSError: The folder cannot be made, or the disk is full.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        with open(draft, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def tensors_path(path: str | Path) -> Path:
    """The file for a path with or without the suffix `.safetensors`; the suffix `.json` is dropped."""
    path = path_of(path)
    if path.suffix == ".json":
        path = path.with_suffix("")
    return path if path.suffix == ".safetensors" else path.with_name(f"{path.name}.safetensors")


def _marks(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file; empty for any other file."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError, ValueError, RuntimeError):  # or replaced while it was opened
        return {}


def _checksum(text: str, tensors: Mapping[str, torch.Tensor]) -> str:
    found = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        found.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}".encode())
        found.update(tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes() if tensors[name].numel() else b"")
    return found.hexdigest()


def require_writable(path: str | Path) -> None:
    """Raise if a file cannot be written, before the work is done whose result it is to hold. Folders are made.

    Raises:
        OSError: The path is a folder, or its folder cannot be made or written.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give the name of a file.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error}.") from error
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise PermissionError(f"{path} cannot be written: no permission.")
