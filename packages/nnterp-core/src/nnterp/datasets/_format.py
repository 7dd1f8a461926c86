"""How a dataset lies in its folder: names of files, of the tensors that describe prompts, and of dtypes.

manifest.json                 what was collected, of which model, with which shards
shards/000000.safetensors     the values of some prompts, their token ids, texts and positions
shards/000000.json            written when the shard is whole: its checksum and sizes
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, TypeAlias

import torch

# What one stored row of a value belongs to: a prompt, one of its positions, or a prompt's attention pattern.
Per: TypeAlias = Literal["prompt", "position", "pattern"]

FORMAT = "nnterp activations 1"
PROMPTS = SimpleNamespace(
    token_ids="prompts.token_ids",  # of all prompts, one after the other
    tokens="prompts.tokens",  # how many each has
    positions="prompts.positions",  # the positions that are stored, of all prompts
    counts="prompts.positions_stored",  # how many each has
    text="prompts.text",  # UTF-8, of all prompts
    text_bytes="prompts.text_bytes",  # how many bytes each has; -1 for a prompt without text
)
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
NAMES_OF_DTYPES = {dtype: name for name, dtype in DTYPES.items()}


def manifest_path(folder: Path) -> Path:
    """The file that says what a dataset holds."""
    return folder / "manifest.json"


def shard_path(folder: Path, number: int) -> Path:
    """The file of a shard."""
    return folder / "shards" / f"{number:06d}.safetensors"


def entry_path(folder: Path, number: int) -> Path:
    """The file that says that a shard is whole."""
    return shard_path(folder, number).with_suffix(".json")


def numbers_of_entries(folder: Path) -> list[int]:
    """The shards that are whole."""
    found = (path.stem for path in (folder / "shards").glob("*.json") if not path.name.startswith("."))
    return sorted(int(name) for name in found if name.isdigit())


def label(value: str, layer: int | None) -> str:
    """The name of a tensor in a shard."""
    return value if layer is None else f"{value}[{layer}]"


def per_of(value: Any, single: bool, at_end: bool) -> Per:
    """What one stored row of a value belongs to: a prompt, one of its positions, or a prompt's attention pattern."""
    if value.is_pattern:
        return "pattern"
    return "prompt" if single or at_end else "position"
