"""Weights that still are what their file holds, as the kernel knows without reading them.

The loader of safetensors gives tensors whose memory is a private mapping of the file. The kernel copies a page of such
a mapping when it is first written, by whatever way: an operation of torch, `.data`, NumPy, a pointer. Its page table,
`/proc/self/pagemap` on Linux, says of each page whether it is still the file's.
"""

from __future__ import annotations

import bisect
import mmap
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from nnterp.identity._checkpoint import Checkpoint

_PAGE = mmap.PAGESIZE
_ENTRY = 8  # bytes of the page table's entry of one page; the bits below: Documentation/admin-guide/mm/pagemap.rst
_SWAPPED, _OF_FILE = 1 << 62, 1 << 61  # the highest, 63: present


@dataclass(frozen=True)
class _Area:
    """A part of this process' memory that is a private mapping of a file.

    Attributes:
        start, end: Addresses.
        offset: Where in the file it begins.
        file: The file's device and inode, as the kernel writes them.
    """

    start: int
    end: int
    offset: int
    file: str


def places_in_files(tensors: Iterable[torch.Tensor], files: Checkpoint) -> list[str]:
    """Return for each tensor where its numbers stand in a file, "model.safetensors+4096"; "" where that is not certain.

    It is certain if the tensor's memory is a private mapping of the file that is there now under this name, and no page
    of it was ever written. What is written into the file changes its mapping too: the places tell the numbers only
    together with the digest of the files.
    """
    tensors = list(tensors)
    if files.folder is None or not sys.platform.startswith("linux"):
        return [""] * len(tensors)
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as table:
            names = {own: name for name in files.weights() for own in _file(files.folder / name, table.fileno())}
            areas = _areas()
            starts = [area.start for area in areas]
            return [_place(tensor, areas, starts, names, table.fileno()) for tensor in tensors]
    except (OSError, ValueError):
        return [""] * len(tensors)


def _file(path: Path, table: int) -> list[str]:
    """The file as the kernel names it in mappings made now; [] if a page written in one is not told from the others."""
    with path.open("rb") as opened:
        if not (size := os.fstat(opened.fileno()).st_size):
            return []
        page = torch.frombuffer(mmap.mmap(opened.fileno(), min(size, _PAGE), access=mmap.ACCESS_COPY), dtype=torch.uint8)
    address = page.data_ptr()
    area = next((area for area in _areas() if area.start <= address < area.end), None)
    first = int(page[0])
    read = _entries(table, address, 1)
    page[0] = first
    written = _entries(table, address, 1)
    told = read.item() < 0 and _are_files(read) and not _are_files(written)
    return [area.file] if area is not None and told else []


def _areas() -> list[_Area]:
    """The private mappings of files in this process' memory, by address."""
    found = []
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        for line in maps:
            span, rights, offset, device, inode = line.split(maxsplit=5)[:5]
            if inode != "0" and rights.endswith("p"):
                start, end = (int(address, 16) for address in span.split("-"))
                found.append(_Area(start, end, int(offset, 16), f"{device} {inode}"))
    return found


def _place(tensor: torch.Tensor, areas: list[_Area], starts: list[int], names: dict[str, str], table: int) -> str:
    if not _is_plain(tensor):
        return ""
    start, length = tensor.data_ptr(), tensor.numel() * tensor.element_size()
    index = bisect.bisect_right(starts, start) - 1
    area = areas[index] if index >= 0 else None
    if area is None or start + length > area.end or area.file not in names:
        return ""
    pages = (start + length - 1) // _PAGE - start // _PAGE + 1
    if not _are_files(_entries(table, start, pages)):
        return ""
    return f"{names[area.file]}+{area.offset + start - area.start}"


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor's numbers are the bytes at its address, one after the other."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or hasattr(tensor, "__tensor_flatten__"):
        return False
    return tensor.numel() > 0 and tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg())


def _entries(table: int, address: int, pages: int) -> torch.Tensor:
    """The page table's entries of the pages from the one at an address on, int64."""
    wanted, found = pages * _ENTRY, bytearray()
    while len(found) < wanted:
        some = os.pread(table, wanted - len(found), address // _PAGE * _ENTRY + len(found))
        if not some:
            raise OSError("The page table ends early.")
        found += some
    return torch.frombuffer(found, dtype=torch.int64)


def _are_files(entries: torch.Tensor) -> bool:
    """Whether all pages are the file's: those that are not in memory (and not in swap) would be read from it."""
    return bool((((entries & _OF_FILE) != 0) | (entries >= 0)).logical_and((entries & _SWAPPED) == 0).all())
