"""Where proofs are kept, and how much of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

VARIABLE = "NNTERP_CACHE"  # the folder, or one of OFF
OFF = ("off", "0", "no", "false", "none")
SUFFIX = ".safetensors"
AT_MOST = 2000  # files; beyond it those that were longest unused are deleted


@dataclass(frozen=True)
class Kept:
    """The proofs that are on disk.

    Attributes:
        folder: Where they are; None if keeping proofs is switched off.
        files: How many there are.
        size: Their size in bytes.
    """

    folder: Path | None
    files: int = 0
    size: int = 0

    def __str__(self) -> str:
        if self.folder is None:
            return f"Proofs are not kept: {VARIABLE}={os.environ.get(VARIABLE)}."
        return f"{self.files} proofs, {self.size / 1e6:.1f} MB, in {self.folder}"


def folder() -> Path | None:
    """The folder that proofs are kept in: `proofs` in `$NNTERP_CACHE`, by default in `~/.cache/nnterp`.

    Returns:
        The folder, which may not exist yet; None if `NNTERP_CACHE` is "off".
    """
    named = os.environ.get(VARIABLE, "").strip()
    if named.lower() in OFF:
        return None
    return Path(named or "~/.cache/nnterp").expanduser() / "proofs"


def kept() -> Kept:
    """Return how many proofs are on disk, and where."""
    where = folder()
    sizes = [file.stat().st_size for file in _files(where)]
    return Kept(where, len(sizes), sum(sizes))


def clear() -> Kept:
    """Delete all proofs on disk, and drafts that a killed process left; return what was there.

    Raises:
        OSError: One cannot be deleted.
    """
    before = kept()
    for file in _files(before.folder, drafts=True):
        file.unlink(missing_ok=True)
    for own in sorted(before.folder.iterdir()) if before.folder is not None and before.folder.is_dir() else ():
        if own.is_dir() and not any(own.iterdir()):
            own.rmdir()
    return before


def prune(where: Path) -> None:
    """Delete the files that were longest unused, where there are more than `AT_MOST`.

    Raises:
        OSError: One cannot be deleted.
    """
    files = list(_files(where, drafts=True))
    if len(files) > AT_MOST:
        files.sort(key=lambda file: file.stat().st_mtime)
        for file in files[: len(files) - AT_MOST]:
            file.unlink(missing_ok=True)


def _files(where: Path | None, drafts: bool = False) -> Iterator[Path]:
    for own in where.iterdir() if where is not None and where.is_dir() else ():
        for file in own.iterdir() if own.is_dir() and not own.is_symlink() else ():
            draft = file.name.startswith(".") and SUFFIX in file.name
            if (file.name.endswith(SUFFIX) and not draft) or (drafts and draft):
                yield file
