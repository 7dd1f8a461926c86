"""The tensors of a lens while they are being filled, and what is kept of them if the lens is cut short."""

from __future__ import annotations

from typing import Any

import torch

from nnterp.interventions._partial import DONE, unfinished
from nnterp.interventions._results import Result
from nnterp.resuming import Call

_LEAD = ("prompts", "layers", "positions")


class LensRun:
    """What a call of `logit_lens` has read.

    Attributes:
        whole: Tensors `[prompts, layers, positions, ...]`.
        done: Indices of the prompts that are read.
    """

    def __init__(self, earlier: Result | None, prompts: tuple[str, ...], layers: list[int]) -> None:
        self.prompts, self.layers = prompts, layers
        self.whole: dict[str, torch.Tensor] = {}
        self.done: set[int] = set()
        if earlier is not None:
            self.whole = {name: tensor.clone() for name, tensor in earlier.tensors.items() if name != DONE}
            self.done = set(earlier[DONE].nonzero()[:, 0].tolist())

    def partial(self, call: Call, about: dict[str, Any]) -> Result | None:
        """What is read so far, its positions numbered; None if that is nothing."""
        if not self.whole:
            return None
        axes, labels = {}, {"prompts": self.prompts, "layers": tuple(self.layers)}
        for name, tensor in self.whole.items():
            own = tuple(f"{name} {axis}" for axis in range(3, tensor.dim()))
            axes[name] = (*_LEAD, *own)
            labels |= {axis: tuple(range(tensor.shape[3 + k])) for k, axis in enumerate(own)}
            labels["positions"] = tuple(range(tensor.shape[2]))
        done = torch.zeros(len(self.prompts), dtype=torch.bool)
        done[list(self.done)] = True
        whole = Result(dict(self.whole), axes, labels, about=about)
        return unfinished(call, lambda: whole, done, ("prompts",))
