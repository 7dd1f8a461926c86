"""Results on disk: numbers as safetensors, the rest as JSON."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from nnterp.prompts._results import PromptResults

_NUMBERS, _REST = "scores.safetensors", "run.json"
_VERSION = 1


def save(results: PromptResults, folder: str | Path) -> None:
    """See `PromptResults.save`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {"log_probs": results.log_probs.contiguous(), "done": results.done}
    if results.vocabulary_ranks is not None:
        tensors["vocabulary_ranks"] = results.vocabulary_ranks
    for i, rows in results.pending.items():
        tensors |= {f"pending.{i}.{j}": answer.contiguous() for j, answer in rows.items()}
    rest = {
        "version": _VERSION,
        "categories": results.categories,
        "settings": results.settings,
        "prompts": [
            {"text": text, "fingerprint": fingerprint, "metadata": data}
            for text, fingerprint, data in zip(results.texts, results.fingerprints, results.metadata, strict=True)
        ],
    }
    # What is in the JSON does not change while a run goes on, so a checkpoint cut short between the two files is whole.
    told = json.dumps(rest, indent=1, ensure_ascii=False, default=_plain).encode()
    _write(folder / _REST, told)
    _write(folder / _NUMBERS, save_tensors(tensors, metadata={"run": hashlib.sha256(told).hexdigest()}))


def load(folder: str | Path) -> PromptResults:
    """See `PromptResults.load`."""
    folder = Path(folder)
    if not exists(folder):
        raise FileNotFoundError(f"{folder} holds no results: {_NUMBERS} and {_REST} were expected in it.")
    told, numbers = (folder / _REST).read_bytes(), (folder / _NUMBERS).read_bytes()
    if _metadata(numbers).get("run") != hashlib.sha256(told).hexdigest():
        raise ValueError(f"{folder}: {_NUMBERS} and {_REST} are not of one run, or one was changed by hand.")
    rest = json.loads(told)
    if rest["version"] != _VERSION:
        raise ValueError(f"{folder / _REST} has version {rest['version']}; this package reads version {_VERSION}.")
    tensors = load_tensors(numbers)
    prompts = rest["prompts"]
    pending: dict[int, dict[int, torch.Tensor]] = {}
    for name in tensors:
        if name.startswith("pending."):
            _, i, j = name.split(".")
            pending.setdefault(int(i), {})[int(j)] = tensors[name]
    return PromptResults(
        categories=tuple(rest["categories"]),
        texts=[prompt["text"] for prompt in prompts],
        metadata=[prompt["metadata"] for prompt in prompts],
        settings=rest["settings"],
        fingerprints=[prompt["fingerprint"] for prompt in prompts],
        log_probs=tensors["log_probs"],
        vocabulary_ranks=tensors.get("vocabulary_ranks"),
        done=tensors["done"],
        pending=pending,
    )


def _metadata(data: bytes) -> dict[str, str]:
    """The metadata of a safetensors file: its header is JSON, after 8 bytes that say how long it is."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]).get("__metadata__", {})


def exists(folder: str | Path) -> bool:
    """Whether a folder holds saved results."""
    return (Path(folder) / _NUMBERS).is_file() and (Path(folder) / _REST).is_file()


def _write(path: Path, data: bytes) -> None:
    """All of the file or what was there before."""
    draft = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        draft.write_bytes(data)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def _plain(value: Any) -> Any:
    """Metadata that JSON does not know: NumPy numbers as numbers, anything else as text."""
    return value.item() if hasattr(value, "item") else str(value)
