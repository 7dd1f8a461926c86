"""The tensors of a result while they are being filled, batch by batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from nnterp.collection._collected import Collected, Tensors
from nnterp.collection._outputs import Index
from nnterp.collection._plan import Plan
from nnterp.collection._reduce import Reduce
from nnterp.collection._select import Selection, pick
from nnterp.inputs import Batch, Row, pad
from nnterp.memory import require_memory, size_of
from nnterp.named_transformer import NamedTransformer


class Filling:
    """The tensors being filled: allocated once, when the first batch shows their shapes."""

    def __init__(
        self,
        plan: Plan,
        rows: list[Row],
        chosen: list[tuple[int, ...]],
        single: bool,
        device: str | torch.device,
        dtype: torch.dtype | None,
        reduce: Reduce,
        front: int = 0,
    ) -> None:
        self.front = front  # keys of attention that stand before the tokens'
        self.plan, self.rows, self.chosen, self.single = plan, rows, chosen, single
        self.device, self.dtype, self.reduce = torch.device(device), dtype, reduce
        self.width = max(len(c) for c in chosen)
        self.keys = max(len(r) if r.encoder is None else max(r.lengths) for r in rows)
        self.filled: dict[int, torch.Tensor] = {}
        self.blocks: dict[str, torch.Tensor] = {}
        self.done: set[int] = set()
        self.over_prompts = isinstance(reduce, str)
        self.summed: tuple[dict[int, torch.Tensor], set[int]] = ({}, set())  # for sums: `filled` and `done`

    def pick(self, batch: Batch) -> Selection:
        """Say where the positions of this batch's rows stand; returns the selection."""
        own = batch.encoder if batch.encoder is not None and self.plan.of_encoder else batch
        return pick(own, self.chosen, self.single, self.front, batch.encoder)

    def put(self, indices: Sequence[int], taken: dict[int, torch.Tensor]) -> None:
        """Write what was read of some prompts, `[prompts, (positions,) ...]`, to where they belong."""
        if self.over_prompts:
            self.add(indices, {t: self.summed_up(t, read.to(self.device), indices) for t, read in taken.items()})
            return
        index = torch.tensor(indices, device=self.device)
        if not self.filled:
            self.require_memory(taken)
        for t, read in taken.items():
            target, tensor = self.plan.targets[t], read.to(self.device)
            into = self.filled.get(t)
            if into is None:
                into = self.filled[t] = self.allocate(t, tensor)
            if callable(self.reduce):
                into = self.filled[t] = self.grown(into, tensor)
            pattern = target.value.is_pattern
            where: list[Any] = [slice(None)] * into.dim()
            for axis in range(1, tensor.dim()):
                if tensor.shape[axis] != into.shape[axis]:
                    where[axis] = slice(0, tensor.shape[axis])
            if pattern or any(w != slice(None) for w in where[1:]):
                view = into[tuple(where)]
                view[index] = tensor
            else:
                into[index] = tensor
        self.done.update(indices)

    def grown(self, into: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
        """Give a tensor of all prompts room for what a function made of some.

        Returns:
            `into` itself if it has the room; else a larger copy, filled up with zeros, of its dtype and device.

        Raises:
            ValueError: It has another number of axes than what was made of earlier prompts.
        """
        if into.dim() != tensor.dim():
            raise ValueError("reduce must return as many axes for every prompt; it returned different numbers of them.")
        wanted = [len(into), *(max(a, b) for a, b in zip(into.shape[1:], tensor.shape[1:], strict=True))]
        if wanted == list(into.shape):
            return into
        whole = into.new_zeros(wanted)
        whole[tuple(slice(0, size) for size in into.shape)] = into
        return whole

    def require_memory(self, taken: dict[int, torch.Tensor]) -> None:
        """Raise MemoryError if there is no room for all prompts, told by the first batch."""
        needed = sum(size_of(self.shape(t, tensor), tensor.dtype) for t, tensor in taken.items())
        instead = "Ask for fewer layers or positions, give reduce= or a smaller dtype=, or collect in parts."
        require_memory(needed, self.device, f"What was asked for of {len(self.rows)} prompts", instead)

    def shape(self, t: int, tensor: torch.Tensor) -> list[int]:
        """Say how large one target of all prompts is, `tensor` being that of a batch; returns the shape."""
        target = self.plan.targets[t]
        shape = list(tensor.shape)
        shape[0] = len(self.rows)
        if not callable(self.reduce):
            axis = 2 if target.value.is_pattern else 1
            if not self.single and not target.last:
                shape[axis] = self.width
            if target.value.is_pattern:
                shape[-1] = max(shape[-1], self.keys)
        return shape

    def allocate(self, t: int, tensor: torch.Tensor) -> torch.Tensor:
        """Make room for all prompts; of one value, the layers lie in one tensor as long as their shapes agree.

        Returns:
            Zeros, in the dtype of `tensor` and on its device.
        """
        target, shape = self.plan.targets[t], self.shape(t, tensor)
        name = target.value.name
        if target.layer is None:
            return tensor.new_zeros(shape)
        layers = list(dict.fromkeys(self.plan.layers[name]))
        block = self.blocks.get(name)
        if block is None:
            block = self.blocks[name] = tensor.new_zeros([len(layers), *shape])
        if list(block.shape[1:]) == shape and block.dtype == tensor.dtype:
            return block[layers.index(target.layer)]
        return tensor.new_zeros(shape)

    def summed_up(self, t: int, tensor: torch.Tensor, indices: Sequence[int]) -> torch.Tensor:
        """Sum over prompts and their own positions.

        Returns:
            The sum without these axes, in float64, on the device of `tensor`.
        """
        own = [self.chosen[i] for i in indices]
        tensor = tensor.double()
        if self.single or self.plan.targets[t].last:
            return tensor.sum(0)
        width = max(len(c) for c in own)
        mask = torch.tensor([[True] * len(c) + [False] * (width - len(c)) for c in own], device=tensor.device)
        axis = 2 if self.plan.targets[t].value.is_pattern else 1
        shape = [len(own), *([1] * (tensor.dim() - 1))]
        shape[axis] = width
        return (tensor * mask.view(shape)).sum((0, axis))

    def add(self, indices: Sequence[int], sums: dict[int, torch.Tensor]) -> None:
        """Add sums over some prompts and their positions, float64, to those of earlier prompts."""
        totals = {t: self.added(t, tensor.to(self.device)) for t, tensor in sums.items()}
        self.summed = totals, self.done | set(indices)  # at once: an interrupt must not come between
        self.filled, self.done = self.summed

    def added(self, t: int, tensor: torch.Tensor) -> torch.Tensor:
        """Add one more sum to what is summed so far; returns the new sum, of the larger of two
        shapes, in the dtype and on the device of the sums."""
        there = self.filled.get(t)
        if there is None or there.shape == tensor.shape:
            return tensor if there is None else there + tensor
        big, small = sorted((there, tensor), key=lambda x: x.shape[-1], reverse=True)
        big = big.clone()
        big[..., : small.shape[-1]] += small
        return big

    def take_over(self, earlier: Collected) -> None:
        """Fill in what an earlier run had finished."""
        done = sorted(earlier.done)
        for t, target in enumerate(self.plan.targets):
            if self.over_prompts:
                self.filled[t] = earlier.sums[target.label].to(self.device)
                continue
            tensor = earlier.part(target.label).to(self.device)
            if t not in self.filled:
                self.filled[t] = self.allocate(t, tensor)
            self.filled[t][done] = tensor[done]
        self.done = set(done)
        self.summed = self.filled, self.done

    def collected(self, num_layers: int, run: dict[str, Any] | None = None) -> Collected:
        """Put what is finished together; `run` is the record of a call that was cut short.

        Returns:
            The result, partial if `run` is given.
        """
        filled, sums, done = self.filled, {}, self.done
        if self.over_prompts:
            filled, done = self.summed
            positions = sum(len(self.chosen[i]) for i in done)
            counts = [len(done) if target.last else positions for target in self.plan.targets]
            dtype = self.dtype or torch.float32
            sums = {self.plan.targets[t].label: total for t, total in filled.items()} if run is not None else {}
            filled = {t: (total / (counts[t] if self.reduce == "mean" else 1)).to(dtype) for t, total in filled.items()}
        tensors = stacked({(t.value.name, t.layer): filled[i] for i, t in enumerate(self.plan.targets)}, self.plan)
        for name, block in self.blocks.items():
            if len(block) == len(self.plan.layers[name]) and self.shares_memory(name, block):
                tensors[name] = block
        mask = None
        if not self.over_prompts:
            mask = torch.tensor([[True] * len(c) + [False] * (self.width - len(c)) for c in self.chosen])
            mask = mask[:, 0] if self.single else mask
        return Collected(
            tensors,
            self.plan.layers,
            tuple(self.chosen),
            mask,
            tuple(self.rows),
            None,
            set(done),
            num_layers,
            sums,
            run,
        )

    def shares_memory(self, name: str, block: torch.Tensor) -> bool:
        """Find out whether all layers of a value were filled into one tensor; returns True if they were."""
        mine = [self.filled[i] for i, t in enumerate(self.plan.targets) if t.value.name == name]
        storage = block.untyped_storage().data_ptr()
        return all(part.untyped_storage().data_ptr() == storage for part in mine)


def stacked(found: dict[tuple[str, Index | None], torch.Tensor], plan: Plan) -> dict[str, Tensors]:
    """By value: one tensor of all its layers, or, where their shapes differ, layer → tensor."""
    tensors: dict[str, Tensors] = {}
    for name, layers in plan.layers.items():
        if not layers:
            tensors[name] = found[name, None]
            continue
        mine = {layer: found[name, layer] for layer in layers}
        alike = len({tuple(part.shape) for part in mine.values()}) == 1
        tensors[name] = torch.stack([mine[layer] for layer in layers]) if alike else mine
    return tensors


def still_to_run(model: NamedTransformer, batch: Batch, done: set[int]) -> Batch | None:
    """A batch without the prompts that an earlier run has finished; None if it has finished all."""
    left = [k for k, i in enumerate(batch.indices) if i not in done]
    if len(left) == len(batch):
        return batch
    return pad(model, [batch.rows[k] for k in left], tuple(batch.indices[k] for k in left)) if left else None
