"""One writer for each share of a folder: locks of the operating system, which end with the process that holds them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path

_PATIENCE = 2.0  # seconds: another process that looks whether a lock is held holds it for a moment
_NAME = re.compile(r"\.writing-(\d+)-of-(\d+)$")


@contextlib.contextmanager
def writing(folder: Path, rank: int, world: int) -> Iterator[None]:
    """A block in which no other process writes the same share of a folder; what dead processes left is taken over.

    Raises:
        BlockingIOError: Another process is writing this share, or the same folder in other shares.
        OSError: The file system has no locks.
    """
    mine = folder / f".writing-{rank}-of-{world}"
    with _locked(mine, f"{folder}, rank {rank} of {world},"):
        for other in sorted(folder.glob(".writing-*-of-*")):
            found = _NAME.search(other.name)
            if other != mine and found and int(found[2]) != world and not _dead(other):
                raise BlockingIOError(
                    f"{folder} is being written in shares of {found[2]} processes ({_who(other)}), and this one would "
                    f"write in shares of {world}. Wait until they have ended, or choose another folder."
                )
        yield


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """A block that one process at a time is in; others wait."""
    with _locked(folder / ".manifest-lock", str(folder), wait=True):
        yield


@contextlib.contextmanager
def _locked(path: Path, what: str, wait: bool = False) -> Iterator[None]:
    deadline = time.monotonic() + _PATIENCE
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        if _take(file, path, wait):
            break
        os.close(file)
        if not wait and time.monotonic() > deadline:
            raise BlockingIOError(
                f"{what} is being written by another process ({_who(path)}). Two writers would write the same shards: "
                f"wait until it has ended, or choose another folder."
            )
        time.sleep(0.02)
    try:
        os.truncate(file, 0)
        os.pwrite(file, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()  # while the lock is held, so that nobody holds a lock on a file without a name
        os.close(file)


def _take(file: int, path: Path, wait: bool) -> bool:
    """Lock an open file; False if another process holds it, or the file has lost its name meanwhile."""
    try:
        import fcntl
    except ImportError:
        raise OSError("Writing a dataset takes file locks (fcntl), which this system does not have.") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        raise OSError(f"{path.parent} is on a file system without locks ({error}). Choose another folder.") from error
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _dead(path: Path) -> bool:
    """Whether the process that took a lock is gone; then its file is removed."""
    try:
        file = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return True
    try:
        if not _take(file, path, wait=False):
            return not path.exists()
        path.unlink()
        return True
    finally:
        os.close(file)


def _who(path: Path) -> str:
    try:
        found = json.loads(path.read_text())
        return f"process {found['pid']} on {found['host']}"
    except (OSError, ValueError, KeyError):
        return "unknown"
