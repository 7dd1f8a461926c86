"""Which rows a steering acts on, decided for each prompt; only for `model.steering`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from nnsight.intervention.interleaver import Mediator

from nnterp.record import Record
from nnterp.traced._own_tokens import Pass

if TYPE_CHECKING:
    from nnterp.traced._running import Running


class Condition(Record):
    """A test of each prompt: whether the stream leaving `layer` points along `direction` by more than `threshold`.

    Attributes:
        layer: Whose output is read, in the pass of the prompt.
        direction: `[hidden]`; the score is its dot product with the stream.
        threshold: Rows with a higher score fulfil the condition; with `below`, rows with a lower one.
        position: Which of the prompt's own tokens; the mean over all of them if None.
    """

    def __init__(
        self, layer: int, direction: torch.Tensor, threshold: float, position: Any = -1, below: bool = False
    ) -> None:
        self.layer, self.direction, self.threshold = layer, direction, threshold
        self.position, self.below = position, below

    def rows(self, model: Running) -> torch.Tensor:
        """Which rows of the running pass, that of the prompt, fulfil it: bool `[rows]`, on the stream's device."""
        stream = model.layers_output[self.layer]
        own = Pass(model, stream, 0, Mediator.current("condition").batch_group, "condition")
        entries = [slice(None)] if self.position is None else [self.position]
        scores = []
        for row in range(own.rows):
            columns = own.find(row, entries, True)
            for copy in range(own.copies):
                state = stream[row * own.copies + copy, columns].float().mean(0)
                scores.append((state * self.direction.to(state)).sum())
        score = torch.stack(scores)
        return score < self.threshold if self.below else score > self.threshold


class Chosen(Record):
    """A test of each prompt by its token ids."""

    layer = -1  # before all of them

    def __init__(self, test: Any) -> None:
        self.test = test

    def rows(self, model: Running) -> torch.Tensor:
        """Which rows of the running pass fulfil it, bool `[rows]`, on the CPU; for the pass of the prompt."""
        own = Pass(model, model.layers_input[0], 0, Mediator.current("when").batch_group, "when")
        chosen = [bool(self.test(own.ids(row))) for row in range(own.rows) for _ in range(own.copies)]
        return torch.tensor(chosen)
