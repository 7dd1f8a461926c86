"""Prompts from a list, an iterator, a JSONL file or a dataset, a window at a time, never all at once."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sized
from os import PathLike
from pathlib import Path
from typing import Any

from nnterp.images import holds_images
from nnterp.inputs import Reader, as_prompts

_COLUMNS = ("text", "prompt", "messages", "input_ids")


def prompts_of(model: Reader, given: Any) -> tuple[Iterable[Any], int | None]:
    """The prompts as something to iterate over once, and how many there are if that is known.

    Args:
        model: The model whose tokenizer reads them.
        given: What `collect` takes; a path of a JSONL file; or any other iterable, such as a generator or a `datasets`
            stream. An entry is a prompt, or a mapping with one of the keys text, prompt, messages and input_ids.

    Raises:
        TypeError: It is none of these.
        ValueError: It is a text that is the name of a JSONL file.
        FileNotFoundError: There is no such file.
    """
    if isinstance(given, PathLike):
        path = Path(given)
        if not path.is_file():
            raise FileNotFoundError(f"There is no file {path}. A prompt is a text; a path is that of a JSONL file.")
        return _lines(path), None
    if isinstance(given, str) and given.endswith((".json", ".jsonl")) and Path(given).is_file():
        raise ValueError(f"{given!r} is a text, and also the name of a file; to read the file give Path({given!r}).")
    listed = isinstance(given, (str, bytes, bytearray, list, tuple, Mapping)) or hasattr(given, "__array__")
    if listed or not isinstance(given, Iterable):
        prompts = as_prompts(model, given)
        return (_entry(prompt, f"Prompt {i}") for i, prompt in enumerate(prompts)), len(prompts)
    total = len(given) if isinstance(given, Sized) else None
    return (_entry(prompt, f"Prompt {i}") for i, prompt in enumerate(given)), total


def windows(prompts: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """The prompts in lists of `size`, the last one with what is left."""
    left = iter(prompts)
    while window := list(itertools.islice(left, size)):
        yield window


def _lines(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
            except ValueError as error:
                raise ValueError(f"Line {number} of {path} is no JSON ({error}).") from None
            yield _entry(entry, f"Line {number} of {path}")


def _row(values: Any, label: str) -> Any:
    """The only row of a tensor or array with two axes, as a tokenizer gives one text; anything else as it is."""
    if getattr(values, "ndim", 1) != 2:
        return values
    if len(values) != 1:
        raise ValueError(f"{label} is an encoding of {len(values)} prompts; in a list, give one for each prompt.")
    return values[0]


def _entry(entry: Any, label: str) -> Any:
    """The prompt that an entry of a source stands for."""
    if not isinstance(entry, Mapping) or holds_images(entry):  # who runs texts refuses images
        return entry
    found = [name for name in _COLUMNS if name in entry]
    if len(found) != 1:
        raise ValueError(
            f"{label} has the keys {', '.join(map(str, entry)) or '(none)'}; it needs exactly one of "
            f"{', '.join(_COLUMNS)}. Or give a generator of prompts: (row['question'] for row in rows)."
        )
    prompt, mask = entry[found[0]], entry.get("attention_mask")
    if found[0] != "input_ids":
        return prompt
    prompt, mask = _row(prompt, label), None if mask is None else _row(mask, label)
    if mask is None:
        return prompt
    return [int(token) for token, keep in zip(prompt, mask, strict=True) if keep]
