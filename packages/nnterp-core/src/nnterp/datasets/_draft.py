"""A shard while it is written: each batch goes to its prompts' place in the file, and nothing of it stays in memory."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch

from nnterp.datasets._format import NAMES_OF_DTYPES, PROMPTS, Per, entry_path, shard_path
from nnterp.files import write_whole
from nnterp.inputs import Row


class Draft:
    """One shard, hidden until `finish` gives it its name.

    Args:
        folder: The dataset's folder.
        number: The number of the shard.
        first: The number of its first prompt.
        rows: Its prompts.
        chosen: For each prompt, the positions that are stored.
        single: Whether they are one position, without an axis.
        per: For each tensor, what its rows belong to.
    """

    def __init__(
        self,
        folder: Path,
        number: int,
        first: int,
        rows: Sequence[Row],
        chosen: Sequence[Sequence[int]],
        single: bool,
        per: Mapping[str, Per],
    ) -> None:
        self.folder, self.number, self.first, self.single, self.per = folder, number, first, single, dict(per)
        self.path = shard_path(folder, number)
        self.draft = self.path.with_name(f".{self.path.name}")
        self.small = described(rows, chosen)
        self.counts = numpy.array([len(c) for c in chosen], dtype=numpy.int64)
        self.lengths = numpy.array([len(row) for row in rows], dtype=numpy.int64)
        self.file: int | None = None
        self.tensors: dict[str, tuple[torch.dtype, list[int]]] = {}
        self.where: dict[str, int] = {}
        self.units: dict[str, numpy.ndarray[Any, Any]] = {}
        self.left = set(range(len(rows)))
        self.dropped = False

    def put(self, indices: Sequence[int], tensors: Mapping[str, torch.Tensor]) -> None:
        """Write what was read of some prompts.

        Args:
            indices: The prompts, counted in this shard.
            tensors: For each name `[prompts, (positions,) ...]`, on the CPU; a prompt's own positions come first.

        Raises:
            OSError: The disk is full, or the file cannot be written.
            ValueError: The shapes or dtypes are others than those of earlier prompts.
        """
        if self.dropped:
            return
        with self._dropping():
            if self.file is None:
                self._begin(tensors)
            for name, tensor in tensors.items():
                self._check(name, tensor)
                size = tensor.element_size()
                for piece, prompt in self._pieces(name, tensor, indices):
                    _write(self._open, data_of(piece), self.where[name] + int(self.units[name][prompt]) * size)
            self.left.difference_update(indices)

    def finish(self, batch_size: int) -> None:
        """Write the prompts themselves, and give the shard its name; then its entry, which says that it is whole.

        Raises:
            OSError: The disk is full.
            RuntimeError: A prompt was not written.
        """
        if self.dropped:
            return
        with self._dropping():
            if self.left:
                raise RuntimeError(f"Prompts {sorted(self.left)[:5]} of shard {self.number} were not written.")
            for name, tensor in self.small.items():
                _write(self._open, data_of(tensor), self.where[name])
            os.fsync(self._open)
            with os.fdopen(self._open, "rb", closefd=False) as whole:
                whole.seek(0)
                digest, size = hashlib.file_digest(whole, "sha256").hexdigest(), os.fstat(self._open).st_size
            os.replace(self.draft, self.path)
            os.close(self._open)
            self.file = None
        entry = {
            "file": self.path.name,
            "sha256": digest,
            "bytes": size,
            "first": self.first,
            "prompts": len(self.counts),
            "positions": int(self.counts.sum()),
            "tokens": int(self.lengths.sum()),
            "batch_size": batch_size,
            "tensors": {
                name: {"dtype": NAMES_OF_DTYPES[dtype], "shape": shape} for name, (dtype, shape) in self.tensors.items()
            },
        }
        with self._dropping():
            write_whole(entry_path(self.folder, self.number), json.dumps(entry).encode())

    def drop(self) -> None:
        """Remove the file if it is not finished; nothing more is written."""
        self.dropped = True
        if self.file is not None:
            os.close(self.file)
            self.file = None
        self.draft.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _dropping(self) -> Iterator[None]:
        """A block after whose error the file is removed."""
        try:
            yield
        except BaseException as error:
            self.drop()
            if isinstance(error, OSError):
                raise type(error)(
                    error.errno,
                    f"{error.strerror or error}: the shard {self.path} could not be written. What was written before "
                    f"it is whole. Make room, and the same call of collect() goes on from there",
                ) from error
            raise

    @property
    def _open(self) -> int:
        assert self.file is not None
        return self.file

    def _begin(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Lay the file out, now that shapes are known, and write its header."""
        shapes: dict[str, tuple[torch.dtype, list[int]]] = {}
        for name, tensor in tensors.items():
            if tensor.dtype not in NAMES_OF_DTYPES:
                raise ValueError(f"{name} is {tensor.dtype}, which safetensors files do not hold. Give dtype=.")
            inner, per_prompt = self._inner(name, tensor), numpy.ones_like(self.counts)
            self.tensors[name] = tensor.dtype, inner
            if self.per[name] == "position":
                per_prompt = self.counts
            elif self.per[name] == "pattern":
                per_prompt = self.lengths * (1 if self.single else self.counts)
            ends = numpy.cumsum(per_prompt)
            unit = int(numpy.prod(inner, dtype=numpy.int64))
            self.units[name] = (ends - per_prompt) * unit
            total = int(ends[-1])
            shapes[name] = tensor.dtype, [total * unit] if self.per[name] == "pattern" else [total, *inner]
        shapes |= {name: (tensor.dtype, list(tensor.shape)) for name, tensor in self.small.items()}
        header: dict[str, Any] = {"__metadata__": {"nnterp": "activations", "shard": str(self.number)}}
        at = 0
        for name in sorted(shapes, key=lambda name: (-shapes[name][0].itemsize, name)):  # each begins aligned
            dtype, shape = shapes[name]
            size = int(numpy.prod(shape, dtype=numpy.int64)) * dtype.itemsize
            header[name] = {"dtype": NAMES_OF_DTYPES[dtype], "shape": shape, "data_offsets": [at, at + size]}
            self.where[name] = at
            at += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        begin = 8 + len(text)
        self.where = {name: begin + start for name, start in self.where.items()}
        self.draft.parent.mkdir(exist_ok=True)
        self.draft.unlink(missing_ok=True)
        self.file = os.open(self.draft, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        _write(self.file, memoryview(len(text).to_bytes(8, "little") + text), 0)
        os.ftruncate(self.file, begin + at)

    def _inner(self, name: str, tensor: torch.Tensor) -> list[int]:
        """The shape of one stored row; of a pattern, the heads."""
        if self.per[name] == "pattern":
            return [tensor.shape[1]]
        return list(tensor.shape[2 if self.per[name] == "position" else 1 :])

    def _check(self, name: str, tensor: torch.Tensor) -> None:
        now, then = (tensor.dtype, self._inner(name, tensor)), self.tensors[name]
        if now != then:
            raise ValueError(f"{name} has rows of {now[1]} {now[0]} in one batch and {then[1]} {then[0]} in another.")

    def _pieces(self, name: str, tensor: torch.Tensor, indices: Sequence[int]) -> Iterator[tuple[torch.Tensor, int]]:
        """What is written in one piece, and the prompt at whose place it begins: neighbours go together."""
        if self.per[name] == "pattern":
            for k, prompt in enumerate(indices):
                keys = int(self.lengths[prompt])
                own = tensor[k, ..., :keys] if self.single else tensor[k, :, : int(self.counts[prompt]), :keys]
                yield own, prompt
            return
        width = tensor.shape[1] if self.per[name] == "position" else None
        k = 0
        while k < len(indices):
            end = k + 1
            if width is None or self.counts[indices[k]] == width:
                while end < len(indices) and indices[end] == indices[end - 1] + 1:
                    if width is not None and self.counts[indices[end]] != width:
                        break
                    end += 1
                yield tensor[k:end], indices[k]
            else:
                yield tensor[k, : int(self.counts[indices[k]])], indices[k]
            k = end


def described(rows: Sequence[Row], chosen: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    """Prompts as the tensors that stand in a shard: token ids, texts, and the positions that are stored."""
    texts = [None if row.text is None else row.text.encode("utf-8", "surrogatepass") for row in rows]
    joined = bytearray(b"".join(text or b"" for text in texts))
    return {
        PROMPTS.token_ids: torch.tensor([i for row in rows for i in row.ids], dtype=torch.int32),
        PROMPTS.tokens: torch.tensor([len(row) for row in rows], dtype=torch.int64),
        PROMPTS.positions: torch.tensor([p for mine in chosen for p in mine], dtype=torch.int32),
        PROMPTS.counts: torch.tensor([len(mine) for mine in chosen], dtype=torch.int64),
        PROMPTS.text: torch.frombuffer(joined, dtype=torch.uint8) if joined else torch.empty(0, dtype=torch.uint8),
        PROMPTS.text_bytes: torch.tensor([-1 if text is None else len(text) for text in texts], dtype=torch.int64),
    }


def data_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor on the CPU."""
    if not tensor.numel():
        return memoryview(b"")
    return memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())


def _write(file: int, data: memoryview, start: int) -> None:
    done = 0
    while done < len(data):
        written = os.pwrite(file, data[done:], start + done)
        if not written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done += written
