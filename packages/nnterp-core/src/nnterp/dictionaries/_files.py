"""Opening published files: tensors and settings, never code."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file


def read_settings(path: Path) -> dict[str, Any]:
    """What a JSON or YAML file says.

    Raises:
        ValueError: It is damaged, or holds something else than settings by name.
    """
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error!s:.150}).") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds {type(found).__name__}, and settings by name were expected.")
    return found


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors or npz file, as they are stored, on the CPU. Nothing in them is run.

    Raises:
        ValueError: The file is truncated or damaged, holds code, or something that is not finite.
    """
    try:
        if path.suffix == ".npz":
            with numpy.load(path, allow_pickle=False) as file:
                found = {name: torch.from_numpy(file[name]) for name in file.files}
        else:
            found = load_file(path)
    except (SafetensorError, zipfile.BadZipFile, ValueError, TypeError, EOFError, OSError, KeyError) as error:
        raise ValueError(
            f"{path} is truncated, damaged, or holds more than tensors ({type(error).__name__}: {error!s:.150})."
        ) from error
    for name, tensor in found.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"{path}: {name} is not finite everywhere.")
    return found


def require_tensors(
    path: Path, found: Mapping[str, torch.Tensor], needed: Collection[str], known: Collection[str] = ()
) -> None:
    """Raise unless a file holds these tensors, and no others but `known` ones.

    Raises:
        ValueError: One is missing, or one is unknown and may change what the others mean.
    """
    missing, unknown = [n for n in needed if n not in found], [n for n in found if n not in {*needed, *known}]
    if missing or unknown:
        what = f"has no {', '.join(missing)}" if missing else f"also holds {', '.join(unknown[:5])}"
        raise ValueError(
            f"{path} {what}. It holds {', '.join(list(found)[:12])}; what is read here is {', '.join(needed)}"
            f"{' and, where there is one, ' + ', '.join(known) if known else ''}."
        )


def require_shapes(where: str, found: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise unless the tensors have these shapes, those that are there.

    Raises:
        ValueError: One has another shape.
    """
    for name, shape in shapes.items():
        if name in found and tuple(found[name].shape) != shape:
            raise ValueError(f"{where}: {name} has shape {list(found[name].shape)}, and {list(shape)} was expected.")


def setting(where: Any, settings: Mapping[str, Any], name: str, kind: type | tuple[type, ...]) -> Any:
    """One setting that has to be there.

    Raises:
        ValueError: It is missing or of another kind.
    """
    value = settings.get(name)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{where}: {name} is {value!r:.60}, and {kind} was expected.")
    return value


def one_of(where: Any, name: str, value: Any, known: Collection[Any]) -> Any:
    """A value that is known.

    Raises:
        ValueError: It is not; lists those that are.
    """
    try:
        if value in known:
            return value
    except TypeError:
        pass
    raise ValueError(f"{where}: {name} is {value!r:.60}, which is not read. Known: {', '.join(map(repr, known))}.")
