"""Tensors and a JSON record in one folder: `scores.safetensors` and `run.json`.

`scores.safetensors` holds both, and replacing it is what makes a write take effect. `run.json` is a copy of the record
for people to read.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

_TENSORS, _RECORD = "scores.safetensors", "run.json"
_VERSION = 1
_EMBEDDED = "run"  # the tensor that holds the record's text


def write(folder: str | Path, tensors: Mapping[str, torch.Tensor], record: Mapping[str, Any]) -> None:
    """Write tensors and a record to a folder, which is made if it does not exist.

    Whenever the write is cut short, `read` finds what was there before or what was to be written.

    Raises:
        FileExistsError: A file of that name is there and was not written by this function.
        OSError: The folder cannot be made or written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _refuse_foreign_files(folder)
    plain = _with_text_keys({"version": _VERSION, **record})
    text = json.dumps(plain, indent=1, ensure_ascii=False, default=_plain).encode()
    contents = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    contents[_EMBEDDED] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    marks = {"run": hashlib.sha256(text).hexdigest(), "data": _checksum(contents)}
    drafts = {name: folder / f".{name}.{uuid4().hex}" for name in (_TENSORS, _RECORD)}
    try:
        _write(drafts[_TENSORS], save_tensors(contents, metadata=marks))
        _write(drafts[_RECORD], text)
        copy = folder / _RECORD
        if copy.is_file() and copy.read_bytes() != text:
            copy.unlink()  # it must not stand beside numbers that it does not describe
        os.replace(drafts[_TENSORS], folder / _TENSORS)
        os.replace(drafts[_RECORD], copy)
    finally:
        for draft in drafts.values():
            draft.unlink(missing_ok=True)


def read(folder: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the tensors and the record that `write` wrote to a folder.

    Raises:
        FileNotFoundError: They are not there.
        ValueError: A file is truncated, damaged, or was not written by `write`, the two files are not from one call of
            it, or another version of this package wrote them.
    """
    path, copy = Path(folder) / _TENSORS, Path(folder) / _RECORD
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no results: {_TENSORS} and {_RECORD} were expected in it.")
    data = path.read_bytes()
    marks = _marks(path, data[:8], data[8:])
    try:
        tensors = load_tensors(data)
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} is truncated or damaged ({error})") from error
    if "data" in marks and marks["data"] != _checksum(tensors):
        raise ValueError(f"{path} is damaged: its numbers are not those that were written.")
    embedded = tensors.pop(_EMBEDDED, None)
    if copy.is_file():
        text = copy.read_bytes()
    elif embedded is not None:
        text = embedded.numpy().tobytes()
    else:
        raise FileNotFoundError(f"{folder} holds {_TENSORS}, but not {_RECORD}, which belongs to it.")
    if marks["run"] != hashlib.sha256(text).hexdigest():
        raise ValueError(f"{folder}: {_TENSORS} and {_RECORD} are not of one run, or {_RECORD} was changed or damaged.")
    record = json.loads(text)
    if record["version"] != _VERSION:
        raise ValueError(f"{copy} has version {record['version']}; this package reads version {_VERSION}.")
    return tensors, record


def exists(folder: str | Path) -> bool:
    """Return True if there is something for `read` in a folder."""
    return (Path(folder) / _TENSORS).is_file()


def _refuse_foreign_files(folder: Path) -> None:
    """Raise if writing to a folder would replace a file that `write` did not write.

    Raises:
        FileExistsError: It would.
    """
    for name, check in ((_TENSORS, _check_tensors), (_RECORD, _check_record)):
        path = folder / name
        try:
            if path.exists():
                check(path)
        except ValueError as error:
            raise FileExistsError(
                f"{error}. The file is not overwritten: choose another folder, or remove it."
            ) from error


def _check_tensors(path: Path) -> None:
    """Raise unless a file has the header that `write` gives it.

    Raises:
        ValueError: It has not.
    """
    with path.open("rb") as file:
        start = file.read(8)
        _marks(path, start, file.read(min(int.from_bytes(start, "little"), path.stat().st_size)))


def _check_record(path: Path) -> None:
    """Raise unless a file is a record as `write` writes them.

    Raises:
        ValueError: It is not.
    """
    try:
        record = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged, or no JSON ({error})") from error
    if not isinstance(record, dict) or not {"version", "categories", "settings", "prompts"} <= set(record):
        raise ValueError(f"{path} was not written by PromptResults.save")


def _marks(path: Path, start: bytes, header: bytes) -> dict[str, str]:
    """Return the metadata that `write` puts into a safetensors file.

    Args:
        path: The file, for messages.
        start: Its first 8 bytes, which give the length of the header.
        header: The bytes after these; more than the header will do.

    Raises:
        ValueError: The file is truncated or damaged, or `write` did not write it.
    """
    length = int.from_bytes(start, "little")
    try:
        if len(start) < 8 or len(header) < length:
            raise ValueError(f"it ends after {len(start) + len(header)} bytes")
        marks = json.loads(header[:length]).get("__metadata__", {})
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is truncated or damaged, or no safetensors file ({error})") from error
    if "run" not in marks:
        raise ValueError(f"{path} was not written by PromptResults.save")
    return marks


def _checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype};".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _with_text_keys(value: Any) -> Any:
    """Return nested dicts and lists with the keys as texts, as JSON needs them."""
    if isinstance(value, Mapping):
        return {str(key): _with_text_keys(item) for key, item in value.items()}
    return [_with_text_keys(item) for item in value] if isinstance(value, (list, tuple)) else value


def _plain(value: Any) -> Any:
    """Turn what JSON does not know into numbers and lists (NumPy's and torch's) or a text (everything else)."""
    return value.tolist() if hasattr(value, "tolist") else str(value)
