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
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from nnterp.identity._checkpoint import Checkpoint

_PAGE = mmap.PAGESIZE
_ENTRY = 8  # bytes of the page table's entry of one page; the bits below: Documentation/admin-guide/mm/pagemap.rst
_PRESENT, _SWAPPED, _OF_FILE = -1 << 63, 1 << 62, 1 << 61


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
            trials = {name: page for name in files.weights() for page in _first_pages(files.folder / name)}
            areas = _areas()
            names = {
                area.file: name
                for name, page in trials.items()
                for area in areas
                if area.start <= page.data_ptr() < area.end and _tells(table.fileno(), page)
            }
            mapped = [area for area in areas if area.file in names]
            return _places(tensors, mapped, names, [_touched(table.fileno(), area) for area in mapped])
    except (OSError, ValueError):
        return [""] * len(tensors)


def _first_pages(path: Path) -> Iterator[torch.Tensor]:
    """The first page of a file, mapped privately; nothing for an empty file."""
    with path.open("rb") as opened:
        if size := os.fstat(opened.fileno()).st_size:
            page = mmap.mmap(opened.fileno(), min(size, _PAGE), access=mmap.ACCESS_COPY)
            yield torch.frombuffer(page, dtype=torch.uint8)


def _tells(table: int, page: torch.Tensor) -> bool:
    """Whether the page table tells a page of a file that was read from one that was written: this one, in turn."""
    first = int(page[0])
    read = _entries(table, page.data_ptr(), 1)
    page[0] = first
    written = _entries(table, page.data_ptr(), 1)
    return bool((read & _OF_FILE).all() and (written & _PRESENT).all() and not _are_files(written).any())


def _areas() -> list[_Area]:
    """The private mappings of files in this process' memory, by address."""
    found = []
    with open("/proc/self/maps", "rb") as maps:
        for line in maps.read().splitlines():
            if b"/" in line:
                span, rights, offset, device, inode = line.split(maxsplit=5)[:5]
                if rights.endswith(b"p"):
                    start, end = (int(address, 16) for address in span.split(b"-"))
                    found.append(_Area(start, end, int(offset, 16), f"{device.decode()} {inode.decode()}"))
    return found


def _places(tensors: list[torch.Tensor], areas: list[_Area], names: dict[str, str], touched: list[list[int]]) -> list:
    found, starts = [], [area.start for area in areas]
    for tensor in tensors:
        found.append("")
        if not _is_plain(tensor):
            continue
        start, length = tensor.data_ptr(), tensor.numel() * tensor.element_size()
        index = bisect.bisect_right(starts, start) - 1
        if index < 0 or start + length > areas[index].end:
            continue
        first, last = (address // _PAGE for address in (start, start + length - 1))
        if bisect.bisect_left(touched[index], first) == bisect.bisect_right(touched[index], last):
            found[-1] = f"{names[areas[index].file]}+{areas[index].offset + start - areas[index].start}"
    return found


def _touched(table: int, area: _Area) -> list[int]:
    """The pages of an area that are not the file's, by number, in order."""
    files = _are_files(_entries(table, area.start, (area.end - area.start) // _PAGE))
    return [area.start // _PAGE + index for index in (~files).nonzero().flatten().tolist()]


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


def _are_files(entries: torch.Tensor) -> torch.Tensor:
    """Whether pages are the file's: those that are neither in memory nor in swap would be read from it.

    A page of the file that the kernel is moving counts as in swap for that time, and as the file's.
    """
    return ((entries & _OF_FILE) != 0) | ((entries & (_PRESENT | _SWAPPED)) == 0)
