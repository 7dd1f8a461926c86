"""Control vectors in GGUF files, as repeng and llama.cpp write and read them.

`direction.N` is the direction of layer N, counted from 0, and is added to the stream leaving that layer: repeng takes
it from `hidden_states[N + 1]`, and llama.cpp adds it to the output of block N. llama.cpp refuses one of layer 0.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch

ARCHITECTURE = "controlvector"
_INSTALL = "GGUF files need the package gguf: pip install 'nnterp-interventions[gguf]'"


def write_gguf(path: str | Path, directions: dict[int, torch.Tensor], model_type: str) -> Path:
    """Write a control vector; a write that fails leaves an earlier file as it was.

    Raises:
        ModuleNotFoundError: gguf is not installed.
        FileExistsError: The file exists and is no control vector.
        OSError: It cannot be written.
    """
    gguf = _gguf()
    path = Path(path)
    if path.exists():
        try:
            read_gguf(path)
        except ValueError as error:
            raise FileExistsError(f"{path} exists and holds no control vector; choose another name.") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        writer = gguf.GGUFWriter(draft, ARCHITECTURE)
        writer.add_string(f"{ARCHITECTURE}.model_hint", model_type)
        writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(directions))
        for layer, direction in directions.items():
            writer.add_tensor(f"direction.{layer}", direction.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    return path


def read_gguf(path: str | Path) -> tuple[dict[int, torch.Tensor], str]:
    """The directions of a control vector, and the model type that it is for.

    Raises:
        ModuleNotFoundError: gguf is not installed.
        FileNotFoundError: There is no such file.
        ValueError: It is no control vector, is damaged, or holds something else than float tensors.
    """
    gguf = _gguf()
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        reader = gguf.GGUFReader(path)
        architecture = _text(reader, "general.architecture")
        hint = _text(reader, f"{ARCHITECTURE}.model_hint")
    except Exception as error:  # gguf's own errors, numpy's and struct's, by what is damaged
        raise ValueError(f"{path} is no GGUF file, or damaged ({error}).") from error
    if architecture != ARCHITECTURE:
        raise ValueError(f"{path} holds no control vector: its general.architecture is {architecture!r}.")
    if hint is None:
        raise ValueError(f"{path} does not name its model: {ARCHITECTURE}.model_hint is missing.")
    directions = {}
    for tensor in reader.tensors:
        kind, _, layer = tensor.name.partition(".")
        if kind != "direction":
            continue
        if not layer.isdecimal():
            raise ValueError(f"{path} has a direction without a layer: {tensor.name!r}.")
        if tensor.data.dtype.kind != "f":
            raise ValueError(f"{path}: {tensor.name} is stored as {tensor.tensor_type.name}, not as floats.")
        directions[int(layer)] = torch.from_numpy(tensor.data.astype("float32").copy()).flatten()
    return directions, hint


def _text(reader: Any, name: str) -> str | None:
    field = reader.get_field(name)
    return None if field is None or not len(field.parts) else str(bytes(field.parts[-1]), "utf-8")


def _gguf() -> Any:
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(_INSTALL) from error
    return gguf
