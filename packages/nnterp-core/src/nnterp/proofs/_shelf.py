"""Find a proof on disk, or prove and keep it. What is wrong with the disk costs a line in the log, never an error."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from loguru import logger
from safetensors import SafetensorError, safe_open

from nnterp.files import read_tensors, write_tensors
from nnterp.identity import digest
from nnterp.proofs._folder import SUFFIX, VARIABLE, folder, prune
from nnterp.proofs._forms import Reader, Writer
from nnterp.proofs._key import Key, Keyed, What, key_of

T = TypeVar("T")
KIND, FORMAT = "proof", 1
LARGEST = 1 << 28  # bytes of a file that is read
_COMPARED = 4  # files that are looked at to say what differs
_UNREADABLE = (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError, RecursionError)
_SAID = ("Python", "nnterp-core", "nnsight", "transformers", "torch", "accelerate", "dtype", "device", "attention")


class Unfit(ValueError):
    """A proof that was read and is not of this model; says why."""


def proven(
    model: Keyed,
    what: What,
    prove: Callable[[], T],
    *,
    store: Callable[[T], Any] = lambda proof: proof,
    restore: Callable[[Any], T] = lambda stored: stored,
    worth: Callable[[T], bool] = lambda proof: True,
    key: Callable[[Any, What], Key | str] = key_of,
    anew: bool = False,
) -> T:
    """Return a proof from disk if the very same model was proven before; else prove it, and keep it on disk.

    Args:
        model: The model.
        what: Which proof.
        prove: Proves it.
        store: What of the proof is written: values, containers and `what.classes`.
        restore: Makes the proof of what was written; raises `Unfit` if it does not fit the model.
        worth: Whether a proof is kept.
        key: Makes the key of the model for the proof.
        anew: Prove it whatever is on disk.
    """
    where = folder()
    before = f"{VARIABLE} is off" if where is None else _safely(lambda: key(model, what))
    reason = before if isinstance(before, str) else "it was asked for anew" if anew else ""
    if where is not None and not isinstance(before, str):
        file = _file(where, what, before)
        if not anew:
            try:
                found = restore(_read(file, what, before))
            except FileNotFoundError:
                reason = _why_missing(file, what, before)
            except _UNREADABLE as error:
                reason = f"{file} is not used: {_short(error)}"
                logger.warning(f"{reason}.")
            else:
                with contextlib.suppress(OSError):
                    os.utime(file)
                logger.debug(f"{_name(model)}: {what.words}, as proven before: {file}")
                return found
    logger.info(f"{_name(model)}: proving {what.words}, because it is not on disk: {reason}.")
    proof = prove()
    if where is not None and not isinstance(before, str) and worth(proof):
        if _safely(lambda: key(model, what)) == before:
            _keep(where, file, what, before, store(proof))
        else:
            logger.info(f"{_name(model)}: the proof is not kept, because the model changed while it was proven.")
    return proof


def _safely(make: Callable[[], Key | str]) -> Key | str:
    """A key; the reason why it cannot be made, for a model that is too odd for it."""
    try:
        return make()
    except Exception as error:
        return f"what it rests on cannot be told ({_short(error)})"


def _name(model: Keyed) -> str:
    return str(model.repo_id or type(model._module).__name__)


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:200]}"


def _file(where: Path, what: What, key: Key) -> Path:
    slug = re.sub(r"[^A-Za-z0-9]+", "-", key["name"]).strip("-")[-40:]
    return where / f"{slug}-{digest(key['name'])}" / f"{what.name}-{digest(key)}{SUFFIX}"


def _read(file: Path, what: What, key: Key) -> Any:
    """What a file holds.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError, ...: It is damaged, or of something else.
    """
    if file.is_file():
        state = file.stat()
        if state.st_size > LARGEST:
            raise ValueError("it is larger than any proof")
        if hasattr(os, "getuid") and state.st_uid != os.getuid():
            raise ValueError("it belongs to another user, who could have written anything into it")
    tensors, record = read_tensors(file, KIND)
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ValueError("it has another format")
    if record.get("key") != key or record.get("what") != what.name:
        raise ValueError("it is of another model")
    return Reader(what.classes, tensors, record["texts"]).value(record["proof"])


def _keep(where: Path, file: Path, what: What, key: Key, stored: Any) -> None:
    try:
        writer = Writer(what.classes)
        form = writer.form(stored)
        record = {"format": FORMAT, "what": what.name, "key": key, "made": time.strftime("%Y-%m-%d %H:%M:%S")}
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.is_symlink() or (file.is_file() and not _is_proof(file)):
            file.unlink()
        write_tensors(file, writer.tensors, {**record, "texts": list(writer.texts), "proof": form}, KIND)
        prune(where)
    except _UNREADABLE as error:
        logger.warning(f"The proof is not kept in {file}: {_short(error)}.")


def _is_proof(file: Path) -> bool:
    try:
        with safe_open(file, framework="pt") as opened:
            return (opened.metadata() or {}).get("nnterp") == KIND
    except (SafetensorError, OSError, ValueError):
        return False


def _why_missing(file: Path, what: What, key: Key) -> str:
    """Why a proof is not there: what differs in the one of this model that is closest, or that there is none."""
    closest: list[str] | None = None
    with contextlib.suppress(OSError):
        others = sorted(file.parent.glob(f"{what.name}-*{SUFFIX}"), key=lambda own: -own.stat().st_mtime)
        for other in others[:_COMPARED]:
            with contextlib.suppress(*_UNREADABLE):
                _, record = read_tensors(other, KIND)
                differ = _differences(record["key"], key)
                closest = differ if closest is None or len(differ) < len(closest) else closest
    if not closest:
        return "nothing is kept for this model yet"
    return f"what is kept was proven with another {', another '.join(closest)}"


def _differences(then: Key, now: Key) -> list[str]:
    return [
        f"{name} ({then.get(name)}, now {now.get(name)})" if name in _SAID else name
        for name in {**now, **then}
        if then.get(name) != now.get(name)
    ]
