"""Which computations a sweep leaves out, because a cell shares them with its prompt's unedited run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from nnterp.interventions._engine._edits import Cell, axes_of
from nnterp.values import get_value


@dataclass(frozen=True)
class Shortcuts:
    """What a sweep may leave out of a cell's run. By default nothing: every cell is a plain forward pass.

    Attributes:
        prefix: Positions before the first edited one come from the key-value cache of the unedited run.
        skip: Layers before the first edited one are skipped.
        readout: The forward pass stops after the last layer; only the hidden states that are read are projected on the
            vocabulary.
        join: Cells that begin at different layers share a batch: each row joins the running batch at its own layer.
        tail: The MLP of the last layer runs only at the positions that are read.
        ragged: Prompts of different lengths share a batch, the shorter ones filled up on the right. Positions after the
            last one that is edited or read do not run.
        window: `prefix` is exact only for prompts shorter than this; None if for all.
        reasons: Why each of the others is not taken.
    """

    prefix: bool = False
    skip: bool = False
    readout: bool = False
    join: bool = False
    tail: bool = False
    ragged: bool = False
    window: int | None = None
    reasons: tuple[str, ...] = ()

    def within(self, length: int, limit: int | None = None) -> Shortcuts:
        """The shortcuts that are exact for prompts of `length` tokens.

        Args:
            length: The longest prompt's length.
            limit: Longest input in which the model attends to every key, which the probes did not go beyond; None if
                there is no such limit.
        """
        if limit is not None and length > limit:
            return replace(self, prefix=False, skip=False, join=False)
        return replace(self, prefix=False) if self.window is not None and length >= self.window else self

    def fitting(self, cells: Sequence[Cell]) -> Shortcuts:
        """Without those shortcuts that cannot be combined with the values that these cells edit."""
        edits = [edit for cell in cells for edit in cell.edits]
        fitting = self
        if any(edit.layer is None for edit in edits):  # the value comes before or after all layers
            fitting = replace(fitting, join=False)
        if any("key" in axes_of(get_value(edit.value)) for edit in edits):  # the value is as wide as the whole prompt
            fitting = replace(fitting, ragged=False)
        return fitting

    @property
    def names(self) -> str:
        """The shortcuts that are taken, for messages: "prefix and skip"."""
        listed = ("prefix", "skip", "readout", "join", "tail", "ragged")
        return " and ".join(name for name in listed if getattr(self, name))
