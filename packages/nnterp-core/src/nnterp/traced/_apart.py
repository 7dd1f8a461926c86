"""Run modules apart from the forward pass that is being traced."""

from __future__ import annotations

from typing import Any


class Apart:
    """While the block is open, modules that are called belong to no trace."""

    def __init__(self, interleaver: Any) -> None:
        self.interleaver = interleaver
        self.before = False

    def __enter__(self) -> None:
        self.before, self.interleaver.interleaving = self.interleaver.interleaving, False

    def __exit__(self, *_: Any) -> None:
        self.interleaver.interleaving = self.before
