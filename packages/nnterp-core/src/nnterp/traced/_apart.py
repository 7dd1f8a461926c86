"""Run modules apart from the forward pass that is being traced."""

from __future__ import annotations

from typing import Any


class Apart:
    """While the block is open, modules that are called belong to no trace."""

    def __init__(self, interleaver: Any) -> None:
        self.interleaver = interleaver
        self.before = False, False

    def __enter__(self) -> None:
        self.before = self.interleaver.interleaving, is_apart(self.interleaver)
        self.interleaver.interleaving, self.interleaver.apart = False, True

    def __exit__(self, *_: Any) -> None:
        self.interleaver.interleaving, self.interleaver.apart = self.before


def is_apart(interleaver: Any) -> bool:
    """Whether modules are run apart at the moment."""
    return getattr(interleaver, "apart", False)
