"""Refuse what cannot fit into memory before it is computed: the CPU's allocator promises more than there is."""

from __future__ import annotations

from collections.abc import Iterable

import psutil
import torch


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on a device; None if it does not say."""
    if device.type == "cpu":
        return int(psutil.virtual_memory().available)
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return None


def size_of(shape: Iterable[int], dtype: torch.dtype) -> int:
    """Bytes of a tensor."""
    numbers = 1
    for length in shape:
        numbers *= length
    return numbers * dtype.itemsize


def require_memory(needed: int, device: torch.device, what: str, instead: str) -> None:
    """Raise if something does not fit.

    Args:
        needed: Bytes.
        device: Where they are to be allocated.
        what: What they hold, for the message.
        instead: What to do instead, a sentence.

    Raises:
        MemoryError: Less is free.
    """
    free = free_memory(device)
    if free is not None and needed > free:
        raise MemoryError(
            f"{what} would take {_readable(needed)}, and {_readable(free)} are free on {device}. {instead}"
        )


def _readable(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**29 else f"{size / 2**20:.0f} MiB"
