"""The manifest of a dataset: what was collected, of which model, and, once all shards are whole, their checksums."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nnterp.collection import Plan
from nnterp.datasets._format import FORMAT, entry_path, manifest_path, numbers_of_entries, per_of, shard_path
from nnterp.datasets._locks import alone
from nnterp.files import write_whole
from nnterp.resuming import Call, differing
from nnterp.versions import version_of

_OF_SHARD = ("file", "sha256", "bytes", "first", "prompts", "positions", "tokens", "batch_size")
_VERSIONS = ("nnterp-core", "nnsight", "transformers", "torch")


def described_call(
    model: Any, call: Call, plan: Plan, single: bool, prompts_per_shard: int, about: Mapping[str, Any]
) -> dict[str, Any]:
    """The manifest of a dataset of which nothing is written yet; `about` replaces or adds entries."""
    settings = call.settings()
    certificate = getattr(model, "certificate", None)
    values = {target.value.name: target for target in plan.targets}
    return {
        "format": FORMAT,
        "complete": False,
        "values": {
            name: {
                "layers": list(plan.layers[name]),
                "stored_per": per_of(target.value, single, target.last),
                "shape": target.value.shape,
            }
            for name, target in values.items()
        },
        "positions": settings["positions"],
        "one_position": single,
        "model": {
            **{name: settings.get(name) for name in ("model", "revision", "model_class", "dtype", "weights")},
            "num_layers": model.num_layers,
        },
        "certificate": None if certificate is None else {**asdict(certificate), "seconds": None},
        "tokenizer": _tokenizer(model.tokenizer),
        "versions": versions(),
        "prompts_per_shard": prompts_per_shard,
        **about,
        "call": settings,
    }


def versions() -> dict[str, str]:
    """The versions that the numbers depend on."""
    return {name: version_of(name) for name in _VERSIONS}


def begin(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Make the folder and write the manifest, or go on in a folder in which the same call has begun.

    Returns:
        The manifest that is in the folder.

    Raises:
        FileExistsError: The folder holds something else, or is a file.
        ValueError: It is the dataset of another call; names what differs.
        OSError: It cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; a dataset is written to a folder.")
    folder.mkdir(parents=True, exist_ok=True)
    path = manifest_path(folder)
    with alone(folder):
        if path.exists():
            there = read_manifest(folder)
            wrong = differing(_comparable(there), json.loads(json.dumps(_comparable(manifest))))
            if wrong:
                raise ValueError(
                    f"{folder} holds a dataset that was made with {wrong}. Repeat the earlier call, or choose another "
                    f"folder."
                )
            return there
        others = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
        if others == ["shards"] and all(p.name.startswith(".") for p in (folder / "shards").glob("*")):
            others = []  # drafts of a process that wrote nothing whole
        if others:
            raise FileExistsError(
                f"{folder} holds {', '.join(others[:3])} and no manifest of a dataset. Choose a new or an empty folder."
            )
        write_whole(path, _text(manifest))
        return dict(manifest)


def withdraw(folder: Path) -> None:
    """Remove the manifest if nothing is written and nobody writes, so that a mistaken call leaves the folder free."""
    with alone(folder):
        if not numbers_of_entries(folder) and not any(folder.glob(".writing-*")):
            manifest_path(folder).unlink(missing_ok=True)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is damaged, or that of something else.
    """
    path = manifest_path(folder)
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no dataset: there is no {path.name} in it.")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        known = manifest["format"] == FORMAT
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged, or no manifest of a dataset ({error}).") from None
    if not known:
        raise ValueError(f"{path} is of the format {manifest['format']!r}, and this version reads {FORMAT!r}.")
    return manifest


def read_entry(folder: Path, number: int) -> dict[str, Any] | None:
    """What was noted of a shard when it was whole; None if the shard is not there.

    Raises:
        ValueError: The entry is damaged.
    """
    path = entry_path(folder, number)
    if not path.is_file() or not shard_path(folder, number).is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise ValueError(f"{path} is damaged. Delete it, and the same call of collect() writes its shard.") from None


def merge(folder: Path, manifest: Mapping[str, Any], prompts: int, shards: int) -> bool:
    """Write the whole manifest if all shards are whole; return whether they are.

    Raises:
        ValueError: The folder has more shards, or another process counted other prompts; or shards disagree in shapes.
    """
    with alone(folder):
        path = manifest_path(folder)
        there = read_manifest(folder) if path.exists() else manifest
        beyond = [number for number in numbers_of_entries(folder) if number >= shards]
        if beyond or (there["complete"] and there["prompts"] != prompts):
            held = f"the shard {shard_path(folder, beyond[0]).name}" if beyond else f"{there['prompts']} prompts"
            raise ValueError(
                f"{folder} holds {held}, and this call gave {prompts} prompts, which are {shards} shards. It is the "
                f"dataset of other prompts, or the processes that write it were not given the same ones."
            )
        entries = [read_entry(folder, number) for number in range(shards)]
        whole = [entry for entry in entries if entry is not None]
        if len(whole) < shards:
            return False
        for entry in whole:
            if entry["tensors"] != whole[0]["tensors"]:
                raise ValueError(f"{folder}: the shards {whole[0]['file']} and {entry['file']} have other shapes.")
        found = {
            **manifest,
            "complete": True,
            "prompts": prompts,
            **{f"{what}_stored": sum(entry[what] for entry in whole) for what in ("positions", "tokens")},
            "tensors": whole[0]["tensors"],
            "shards": [{name: entry[name] for name in _OF_SHARD} for entry in whole],
        }
        for draft in (*folder.glob(".manifest.json.*"), *(folder / "shards").glob(".*")):
            draft.unlink(missing_ok=True)  # what killed processes left
        text = _text(found)
        if not path.exists() or path.read_bytes() != text:
            write_whole(path, text)
    return True


def _comparable(manifest: Mapping[str, Any]) -> dict[str, Any]:
    versions = {f"the version of {name}": version for name, version in manifest["versions"].items()}
    return {**manifest["call"], **versions}


def _text(manifest: Mapping[str, Any]) -> bytes:
    return (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode()


def _tokenizer(tokenizer: Any) -> dict[str, Any]:
    """What is noted of a tokenizer; the token ids themselves are in the shards."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return {
        "class": type(tokenizer).__name__,
        "name": getattr(tokenizer, "name_or_path", None),
        "size": len(tokenizer) if hasattr(tokenizer, "__len__") else None,
        "sha256": None if backend is None else hashlib.sha256(backend.to_str().encode()).hexdigest(),
    }
