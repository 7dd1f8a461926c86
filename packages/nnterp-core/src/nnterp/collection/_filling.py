"""The tensors of a result while they are being filled, batch by batch."""

from __future__ import annotations

from typing import Any

import torch

from nnterp.collection._collected import Collected, Tensors
from nnterp.collection._plan import Plan, Target
from nnterp.collection._reduce import Reduce
from nnterp.collection._select import Selection
from nnterp.inputs import Batch, Row


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
    ) -> None:
        self.plan, self.rows, self.chosen, self.single = plan, rows, chosen, single
        self.device, self.dtype, self.reduce = torch.device(device), dtype, reduce
        self.width = max(len(c) for c in chosen)
        self.keys = max(len(r) for r in rows)
        self.ragged = any(len(c) != self.width for c in chosen)
        self.filled: dict[int, torch.Tensor] = {}
        self.blocks: dict[str, torch.Tensor] = {}
        self.done: set[int] = set()
        self.over_prompts = isinstance(reduce, str)

    def pick(self, batch: Batch) -> Selection:
        """Where the positions of this batch's rows stand."""
        own = [self.chosen[i] for i in batch.indices]
        width = max(len(c) for c in own)
        index = torch.tensor(
            [[s + p for p in c] + [s + c[0]] * (width - len(c)) for s, c in zip(batch.starts, own, strict=True)]
        )
        mask = torch.tensor([[True] * len(c) + [False] * (width - len(c)) for c in own])
        rows, seq = batch.input_ids.shape
        longest = max(range(rows), key=lambda i: len(batch.rows[i]))
        seq += batch.starts[longest]  # a row without padding begins where what the model puts in front ends
        whole = not self.ragged and seq == width and bool((index == torch.arange(width)).all())
        starts = torch.tensor(batch.starts)
        lengths = torch.tensor([len(row) for row in batch.rows])
        return Selection(index, mask, whole, self.single, (rows, seq), starts, lengths)

    def put(self, batch: Batch, taken: dict[int, torch.Tensor]) -> None:
        """Write a batch to where its prompts belong."""
        indices = torch.tensor(batch.indices, device=self.device)
        for t, read in taken.items():
            target, tensor = self.plan.targets[t], read.to(self.device)
            if self.over_prompts:
                self.add(t, target, tensor, batch)
                continue
            into = self.filled.get(t)
            if into is None:
                into = self.filled[t] = self.allocate(t, tensor)
            pattern = target.value.is_pattern
            where: list[Any] = [slice(None)] * into.dim()
            for axis in range(1, tensor.dim()):
                if tensor.shape[axis] != into.shape[axis]:
                    where[axis] = slice(0, tensor.shape[axis])
            if pattern or any(w != slice(None) for w in where[1:]):
                view = into[tuple(where)]
                view[indices] = tensor
            else:
                into[indices] = tensor
        self.done.update(batch.indices)

    def allocate(self, t: int, tensor: torch.Tensor) -> torch.Tensor:
        """Room for all prompts; of one value, the layers lie in one tensor as long as their shapes agree."""
        target = self.plan.targets[t]
        shape = list(tensor.shape)
        shape[0] = len(self.rows)
        if not callable(self.reduce):
            axis = 2 if target.value.is_pattern else 1
            if not self.single:
                shape[axis] = self.width
            if target.value.is_pattern:
                shape[-1] = max(shape[-1], self.keys)
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

    def add(self, t: int, target: Target, tensor: torch.Tensor, batch: Batch) -> None:
        """Sum over prompts and positions, in double precision."""
        own = [self.chosen[i] for i in batch.indices]
        if not self.single:
            width = max(len(c) for c in own)
            mask = torch.tensor([[True] * len(c) + [False] * (width - len(c)) for c in own], device=tensor.device)
            axis = 2 if target.value.is_pattern else 1
            shape = [len(own), *([1] * (tensor.dim() - 1))]
            shape[axis] = width
            tensor = (tensor.double() * mask.view(shape)).sum((0, axis))
        else:
            tensor = tensor.double().sum(0)
        if t in self.filled and self.filled[t].shape != tensor.shape:
            big, small = sorted((self.filled[t], tensor), key=lambda x: x.shape[-1], reverse=True)
            big[..., : small.shape[-1]] += small
            self.filled[t] = big
        elif t in self.filled:
            self.filled[t] += tensor
        else:
            self.filled[t] = tensor

    def collected(self, num_layers: int) -> Collected:
        """The finished result."""
        if self.over_prompts:
            count = sum(len(c) for c in self.chosen) if self.reduce == "mean" else 1
            dtype = self.dtype or torch.float32
            self.filled = {t: (total / count).to(dtype) for t, total in self.filled.items()}
        tensors = stacked({(t.value.name, t.layer): self.filled[i] for i, t in enumerate(self.plan.targets)}, self.plan)
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
            self.done,
            num_layers,
        )

    def shares_memory(self, name: str, block: torch.Tensor) -> bool:
        """Whether all layers of a value were filled into one tensor."""
        mine = [self.filled[i] for i, t in enumerate(self.plan.targets) if t.value.name == name]
        storage = block.untyped_storage().data_ptr()
        return all(part.untyped_storage().data_ptr() == storage for part in mine)


def stacked(found: dict[tuple[str, int | None], torch.Tensor], plan: Plan) -> dict[str, Tensors]:
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
