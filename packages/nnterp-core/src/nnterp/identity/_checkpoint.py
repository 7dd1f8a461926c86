"""What tells the files of a checkpoint from others, without reading them: sizes, times and headers."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

_TENSORS = (".safetensors", ".bin", ".pt", ".pth")
_KINDS = (*_TENSORS, ".json", ".py", ".model")
_LONGEST = 1 << 26  # bytes of a header
# Arguments of `from_pretrained` with which weights come from elsewhere.
_ELSEWHERE = ("state_dict", "cache_dir", "subfolder", "gguf_file", "variant", "adapter_kwargs", "adapter_name", "peft")


@dataclass(frozen=True)
class Checkpoint:
    """The files of a checkpoint.

    Attributes:
        folder: Where they are; None if that cannot be told.
        digest: Of the name, size, and times of modification and of change of every file, and of the header of every
            safetensors file: 16 hexadecimal digits. "" if they cannot be told.
    """

    folder: Path | None = None
    digest: str = ""

    def unchanged(self) -> bool:
        """Whether the files can be told, and are there as they were."""
        return self.folder is not None and self.digest != "" and _digest(self.folder) == self.digest

    def weights(self) -> list[str]:
        """The names of the files that hold tensors, relative to the folder."""
        if self.folder is None:
            return []
        files = [own for own in sorted(self.folder.rglob("*")) if own.name.endswith(_TENSORS) and own.is_file()]
        return [str(file.relative_to(self.folder)) for file in files]


def checkpoint_of(name: str, options: Mapping[str, Any]) -> Checkpoint:
    """Return the files of a checkpoint as they are now. Nothing is downloaded.

    Args:
        name: A folder, or a hub id whose files are in HuggingFace's cache.
        options: The arguments of `from_pretrained`.
    """
    if any(options.get(own) is not None for own in _ELSEWHERE):
        return Checkpoint()
    try:
        folder = _folder(name, options.get("revision"))
    except (OSError, ValueError):
        return Checkpoint()
    return Checkpoint() if folder is None else Checkpoint(folder.absolute(), _digest(folder))


def _digest(folder: Path) -> str:
    found = hashlib.sha256()
    try:
        for part in _files(folder):
            found.update(part)
    except (OSError, ValueError):
        return ""
    return found.hexdigest()[:16]


def _folder(name: str, revision: str | None) -> Path | None:
    if os.path.isdir(name):
        return Path(name)
    config = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(config).parent if isinstance(config, str) else None


def _files(folder: Path) -> Iterator[bytes]:
    for file in sorted(folder.rglob("*")):  # an index may name shards in folders inside
        if not file.name.endswith(_KINDS) or not file.is_file():
            continue
        state = file.stat()
        yield f"{file.relative_to(folder)} {state.st_size} {state.st_mtime_ns} {state.st_ctime_ns};".encode()
        if file.suffix == ".safetensors":
            with file.open("rb") as opened:
                length = int.from_bytes(opened.read(8), "little")
                yield opened.read(min(_LONGEST, length))
