"""A file in which a fit is kept while it runs, and from which the same fit goes on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from nnterp.files import read_tensors, require_writable, tensors_path, write_tensors
from nnterp.resuming import Call

_KIND = "unfinished lens"


class Checkpoint:
    """The file of one fit; without a path it does nothing.

    Args:
        path: The file.
        call: The fit: a file of another one is refused.

    Raises:
        OSError: It cannot be written.
    """

    def __init__(self, path: str | Path | None, call: Call) -> None:
        self.path = None if path is None else tensors_path(path)
        self.call = call
        self.settings = {} if path is None else call.settings()
        if self.path is not None:
            require_writable(self.path)

    @property
    def hint(self) -> str:
        """What to say of it in an error."""
        return "" if self.path is None else f" The same call goes on from {self.path}."

    def read(self) -> dict[str, torch.Tensor]:
        """What was written by a fit that was cut short; empty if there is no file.

        Raises:
            ValueError: It is damaged, or of another fit; names what differs.
        """
        if self.path is None or not self.path.is_file():
            return {}
        tensors, record = read_tensors(self.path, _KIND)
        self.call.check(record, str(self.path))
        return tensors

    def write(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep what there is now, in place of what was kept before."""
        if self.path is not None:
            write_tensors(self.path, tensors, self.settings, _KIND)

    def remove(self) -> None:
        """Delete the file: the fit is complete."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
