"""What was held still in one forward pass, so that another forward pass can be given the same."""

from __future__ import annotations

from contextvars import ContextVar

import torch


class Tape:
    """What one forward pass held still, in the order in which it was made: patterns, scales of norms, gates.

    The first forward pass under `freeze(model, kinds, tape)` records. Every later one is given what was recorded in
    place of its own, so that it is the linear function of the stream that the first one was: only the stream differs.
    Later passes run the same number of tokens in the same batch.
    """

    def __init__(self) -> None:
        self.kept: list[torch.Tensor] = []
        self.full = False
        self.at = 0

    def close(self, whole: bool) -> None:
        """Recording ends: what was recorded is kept if the pass was whole."""
        self.full = whole and bool(self.kept)
        if not self.full:
            self.kept.clear()

    def next(self, own: torch.Tensor) -> torch.Tensor:
        """Record something that the pass made itself, or look up what takes its place.

        Returns:
            What was recorded, or `own` while recording; detached, in the dtype and on the
            device of `own`.

        Raises:
            ValueError: The pass is not like the one that was recorded.
        """
        if not self.full:
            self.kept.append(own.detach().clone())
            return own.detach()
        kept = self.kept[self.at] if self.at < len(self.kept) else None
        if kept is None or kept.shape != own.shape:
            was = "nothing" if kept is None else list(kept.shape)
            raise ValueError(
                f"A tape was recorded in another forward pass: it holds {was} where this one makes {list(own.shape)}. "
                "Run prompts of equally many tokens in batches of one size, and the whole model each time."
            )
        self.at += 1
        return kept


TAPE: ContextVar[Tape | None] = ContextVar("tape", default=None)


def still(own: torch.Tensor) -> torch.Tensor:
    """A tensor as a constant: its own numbers, or those of the pass that was recorded."""
    tape = TAPE.get()
    return own.detach() if tape is None else tape.next(own)


def replaying() -> bool:
    """Whether a pass is given what another one made."""
    tape = TAPE.get()
    return tape is not None and tape.full
