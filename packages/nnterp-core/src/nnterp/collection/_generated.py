"""What was generated from many prompts, and the values at each step, filled in batch by batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from nnterp.collection._collected import Collected
from nnterp.collection._filling import stacked
from nnterp.collection._plan import Plan
from nnterp.collection._reduce import Reduce, reduced
from nnterp.collection._select import Selection
from nnterp.inputs import Row


class Generated:
    """The result of a generation while it is being filled.

    Attributes:
        tokens: The new token ids, `[prompts, tokens]`.
        mask: Which of them are a prompt's own.
        values: Target → `[prompts, tokens, ...]`; what a function made of it, `[prompts, ...]`; or, for "mean" and
            "sum", the sum over each prompt's own positions, `[prompts, ...]`, float64.
        done: The prompts that are filled in.
    """

    def __init__(
        self,
        rows: list[Row],
        plan: Plan,
        width: int,
        device: str | torch.device,
        dtype: torch.dtype | None,
        reduce: Reduce,
    ) -> None:
        self.rows, self.plan, self.width = rows, plan, width
        self.device, self.dtype, self.reduce = torch.device(device), dtype, reduce
        self.values: dict[int, torch.Tensor] = {}
        self.tokens = torch.full((len(rows), width), -1, dtype=torch.long)
        self.mask = torch.zeros(len(rows), width, dtype=torch.bool)
        self.done: set[int] = set()

    def put(
        self, indices: Sequence[int], tokens: torch.Tensor, own: torch.Tensor, values: dict[int, torch.Tensor]
    ) -> None:
        """Write what was made of some prompts to where they belong.

        Args:
            indices: The prompts.
            tokens: New token ids, `[rows, tokens]`.
            own: Which of them are a row's own.
            values: Target → `[rows, tokens, ...]`.
        """
        index = torch.tensor(indices)
        made = {t: self.made_of(tensor, own, self.plan.targets[t].value.shape) for t, tensor in values.items()}
        for t, tensor in made.items():
            self.write(t, index, tensor)
        self.tokens[index, : tokens.shape[1]] = tokens.masked_fill(~own, -1)
        self.mask[index] = False
        self.mask[index, : tokens.shape[1]] = own
        self.done.update(indices)

    def made_of(self, tensor: torch.Tensor, own: torch.Tensor, shape: str) -> torch.Tensor:
        """Make of a value `[rows, tokens, ...]` what is kept of it.

        Returns:
            Its own positions, 0 at the others; for "mean" and "sum" their sum in float64; else what the function made
            of them, in its dtype. On the device of `tensor`.
        """
        longest = int(own.sum(1).max())
        tensor, own = tensor[:, :longest], own[:, :longest]
        hole = (~own).to(tensor.device).view(*own.shape, *([1] * (tensor.dim() - 2)))
        tensor = tensor.masked_fill(hole, 0)
        if isinstance(self.reduce, str):
            return tensor.double().sum(1)
        if self.reduce is None:
            return tensor
        rows, starts, lengths = own.shape[0], torch.zeros(len(own), dtype=torch.long), own.sum(1)
        index = torch.arange(longest).expand(rows, -1)
        picked = Selection(index, own, bool(own.all()), False, (rows, longest), starts, lengths)
        return reduced(self.reduce, tensor, picked, shape).to(device=self.device, dtype=self.dtype)

    def write(self, t: int, index: torch.Tensor, tensor: torch.Tensor) -> None:
        """Write rows of one target; what is there grows with them.

        Raises:
            ValueError: It has another number of axes than what is there.
        """
        there = self.values.get(t)
        wanted = [len(self.rows), *tensor.shape[1:]]
        if there is not None:
            if there.dim() != tensor.dim():
                raise ValueError(
                    "reduce must return as many axes for every prompt; it returned different numbers of them."
                )
            wanted = [max(a, b) for a, b in zip(there.shape, wanted, strict=True)]
        if there is None or list(there.shape) != wanted:
            grown = tensor.new_zeros(wanted)
            if there is not None:
                grown[tuple(slice(0, size) for size in there.shape)] = there
            there = self.values[t] = grown
        there[index.to(there.device)] = 0
        there[(index.to(there.device), *(slice(0, size) for size in tensor.shape[1:]))] = tensor

    def take_over(self, earlier: Collected) -> None:
        """Fill in what an earlier run had finished."""
        done = sorted(earlier.done)
        assert earlier.generated is not None
        self.tokens[done, : earlier.generated.shape[1]] = earlier.generated[done]
        self.mask = self.tokens >= 0
        index = torch.tensor(done)
        for t, target in enumerate(self.plan.targets):
            tensor = earlier.sums[target.label] if isinstance(self.reduce, str) else earlier.part(target.label)
            self.write(t, index, tensor[done].to(self.device))
        self.done.update(done)

    def collected(self, num_layers: int, run: dict[str, Any] | None = None) -> Collected:
        """Put what is finished together; `run` is the record of a call that was cut short.

        Returns:
            The result, partial if `run` is given.
        """
        longest = int(self.mask.sum(1).max())
        mask = self.mask[:, :longest]
        found, sums = {}, {}
        for t, target in enumerate(self.plan.targets):
            whole = self.values[t]
            if isinstance(self.reduce, str):
                sums[target.label] = whole
                total = whole.sum(0) / (int(mask.sum()) if self.reduce == "mean" else 1)
                whole = total.to(self.dtype or torch.float32)
            found[target.value.name, target.layer] = whole
        ends = [len(row) - 1 for row in self.rows]
        positions = tuple(tuple(range(end, end + int(m.sum()))) for end, m in zip(ends, mask, strict=True))
        return Collected(
            stacked(found, self.plan),
            self.plan.layers,
            positions,
            None if isinstance(self.reduce, str) else mask,
            tuple(self.rows),
            self.tokens[:, :longest],
            set(self.done),
            num_layers,
            sums=sums if run is not None else {},
            run=run,
        )
