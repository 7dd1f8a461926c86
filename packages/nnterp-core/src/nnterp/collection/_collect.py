"""Read values of many prompts in one pass, in batches, stopping after the last layer needed."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from tqdm.auto import tqdm

from nnterp.collection._collected import Collected
from nnterp.collection._plan import Plan, make_plan
from nnterp.collection._select import Selection, select
from nnterp.inputs import Batch, Row, batches, encode
from nnterp.positions import TextSelector, resolve

if TYPE_CHECKING:
    from nnterp.standardized_transformer import StandardizedTransformer

Reduce = Literal["mean", "sum"] | Callable[[torch.Tensor], torch.Tensor] | None


def collect(
    model: StandardizedTransformer,
    prompts: Any,
    values: str | Iterable[str],
    layers: int | Iterable[int] | None = None,
    positions: Any = None,
    batch_size: int = 16,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    reduce: Reduce = None,
    progress: bool = True,
    max_new_tokens: int | None = None,
    remote: Any = False,
    **generation: Any,
) -> Collected:
    """See `StandardizedTransformer.collect`."""
    model.require_no_trace("collect()")
    model.prepare(remote)
    if isinstance(reduce, str) and reduce not in ("mean", "sum"):
        raise ValueError(f"reduce is 'mean', 'sum', a function or None, not {reduce!r}.")
    rows = encode(model, prompts)
    if max_new_tokens is not None:
        if remote:
            raise ValueError(
                "collect() over a generation does not run remotely. Generate first, and collect the values of the "
                "whole text: prompts and what was generated, as token ids."
            )
        return _over_generation(
            model, rows, values, layers, positions, batch_size, device, dtype, progress, max_new_tokens, generation
        )
    if generation:
        raise TypeError(
            f"collect() got {', '.join(generation)}; these are settings of a generation, which needs max_new_tokens=."
        )
    plan = make_plan(model, values, layers)
    chosen, single = positions_of(model, rows, positions)
    result = _Result(plan, rows, chosen, single, device, dtype, reduce)
    with (
        left_padded(model),
        tqdm(total=len(rows), desc="collect", unit="prompt", disable=not progress or len(rows) <= batch_size) as bar,
    ):
        for batch in batches(model, rows, batch_size):
            try:
                result.put(batch, _one_batch(model, plan, result, batch, remote))
            except BaseException as error:
                if result.done:
                    error.collected = result.collected(model)  # type: ignore[attr-defined]
                    error.add_note(
                        f"{len(result.done)} of {len(rows)} prompts are finished: see error.collected and its `done`."
                    )
                raise
            bar.update(len(batch))
    return result.collected(model)


@contextlib.contextmanager
def left_padded(model: StandardizedTransformer) -> Iterator[None]:
    """Pad on the left, whatever the tokenizer's side: that side is what the certificate proves to be exact."""
    side = getattr(model.tokenizer, "padding_side", None)
    try:
        if side is not None:
            model.tokenizer.padding_side = "left"
        yield
    finally:
        if side is not None:
            model.tokenizer.padding_side = side


def no_cache(model: StandardizedTransformer) -> dict[str, Any]:
    """`use_cache=False`, for models that take it: nothing is generated, so nothing need be kept."""
    accepts = inspect.signature(model._module.forward).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in accepts.values())
    return {"use_cache": False} if "use_cache" in accepts or open_ended else {}


def positions_of(
    model: StandardizedTransformer, rows: Sequence[Row], positions: Any
) -> tuple[list[tuple[int, ...]], bool]:
    """For each row the positions asked for, and whether they are one position, which has no axis.

    Raises:
        IndexError, ValueError: A row has no such position; names the row, its length and its tokens.
    """
    per_prompt = isinstance(positions, (list, tuple)) and any(
        isinstance(p, (list, tuple, range, slice)) for p in positions
    )
    if per_prompt and len(positions) != len(rows):
        raise ValueError(
            f"positions has {len(positions)} lists for {len(rows)} prompts; give one list per prompt, or one for all."
        )
    chosen = []
    for i, row in enumerate(rows):
        mine = positions[i] if per_prompt else positions
        found = resolve(model, row, mine, f"Prompt {i}")
        if not found:
            raise ValueError(f"positions={mine!r} selects nothing of prompt {i}, which has {len(row)} tokens.")
        chosen.append(found)
    single = hasattr(positions, "__index__") or (isinstance(positions, TextSelector) and positions.which == "last_of")
    return chosen, single


def _one_batch(
    model: StandardizedTransformer, plan: Plan, result: _Result, batch: Batch, remote: Any
) -> dict[int, torch.Tensor]:
    """One forward pass as far as it is needed: what each target is made into."""
    picked, reduce, dtype = result.pick(batch), result.reduce, result.dtype
    device = torch.device("cpu") if remote else result.device
    targets = [(t.combine, t.parts, t.label, t.value.shape) for t in plan.targets]
    steps = list(zip(plan.reads, plan.after, plan.last_use, strict=True))
    inputs = {**batch.encoding, **no_cache(model)}
    with torch.no_grad(), model.trace(inputs, remote=remote) as tracer:
        seen: dict[int, torch.Tensor] = {}
        taken: dict[int, torch.Tensor] = {}
        taken.save()  # type: ignore[attr-defined]  # every object has it in a trace
        for i, (place, complete, dropped) in enumerate(steps):
            seen[i] = place.read(model, str(place))
            for t in complete:
                combine, parts, label, shape = targets[t]
                tensor = select(combine([seen[p] for p in parts]), picked, label, shape)
                taken[t] = _reduced(tensor, reduce, device, dtype)
            for p in dropped:
                del seen[p]
        tracer.stop()
    return taken


def _reduced(tensor: torch.Tensor, reduce: Reduce, device: torch.device, dtype: torch.dtype | None) -> torch.Tensor:
    """What leaves the trace: on the result's device and in its dtype, reduced first."""
    if callable(reduce):
        rows = tensor.shape[0]
        tensor = reduce(tensor)
        if not isinstance(tensor, torch.Tensor) or tensor.dim() < 1 or tensor.shape[0] != rows:
            got = list(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise ValueError(
                f"reduce must keep the first axis, which is the {rows} prompts of the batch; it returned {got}."
            )
    return tensor.detach().to(device=device, dtype=dtype)


class _Result:
    """The tensors being filled: allocated once, when the first batch shows their shapes."""

    def __init__(
        self, plan: Plan, rows: list[Row], chosen: list[tuple[int, ...]], single: bool, device, dtype, reduce: Reduce
    ) -> None:
        self.plan, self.rows, self.chosen, self.single = plan, rows, chosen, single
        self.device, self.dtype, self.reduce = torch.device(device), dtype, reduce
        self.width = max(len(c) for c in chosen)
        self.keys = max(len(r) for r in rows)
        self.ragged = any(len(c) != self.width for c in chosen)
        self.filled: dict[int, torch.Tensor] = {}
        self.stacked: dict[str, torch.Tensor] = {}
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
            pattern = _is_pattern(target.value.shape)
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
            axis = 2 if _is_pattern(target.value.shape) else 1
            if not self.single:
                shape[axis] = self.width
            if _is_pattern(target.value.shape):
                shape[-1] = max(shape[-1], self.keys)
        name = target.value.name
        if target.layer is None:
            return tensor.new_zeros(shape)
        layers = self.plan.layers[name]
        block = self.stacked.get(name)
        if block is None:
            block = self.stacked[name] = tensor.new_zeros([len(layers), *shape])
        if list(block.shape[1:]) == shape and block.dtype == tensor.dtype:
            return block[layers.index(target.layer)]
        return tensor.new_zeros(shape)

    def add(self, t: int, target: Any, tensor: torch.Tensor, batch: Batch) -> None:
        """Sum over prompts and positions, in double precision."""
        own = [self.chosen[i] for i in batch.indices]
        if not self.single:
            width = max(len(c) for c in own)
            mask = torch.tensor([[True] * len(c) + [False] * (width - len(c)) for c in own], device=tensor.device)
            axis = 2 if _is_pattern(target.value.shape) else 1
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

    def collected(self, model: StandardizedTransformer, generated: torch.Tensor | None = None) -> Collected:
        """The finished result."""
        tensors: dict[str, torch.Tensor | dict[int, torch.Tensor]] = {}
        if self.over_prompts:
            count = sum(len(c) for c in self.chosen) if self.reduce == "mean" else 1
            dtype = self.dtype or torch.float32
            self.filled = {t: (total / count).to(dtype) for t, total in self.filled.items()}
        for t, target in enumerate(self.plan.targets):
            name = target.value.name
            if target.layer is None:
                tensors[name] = self.filled[t]
            else:
                mine = tensors.setdefault(name, {})
                assert isinstance(mine, dict)
                mine[target.layer] = self.filled[t]
        for name, mine in tensors.items():
            if isinstance(mine, dict):
                block = self.stacked.get(name)
                if block is not None and all(
                    part.untyped_storage().data_ptr() == block.untyped_storage().data_ptr() for part in mine.values()
                ):
                    tensors[name] = block
                elif len({tuple(part.shape) for part in mine.values()}) == 1:
                    tensors[name] = torch.stack([mine[i] for i in self.plan.layers[name]])
        mask = None
        if self.ragged and not self.over_prompts:
            mask = torch.tensor([[True] * len(c) + [False] * (self.width - len(c)) for c in self.chosen])
        return Collected(
            tensors,
            self.plan.layers,
            tuple(self.chosen),
            mask,
            tuple(self.rows),
            generated,
            self.done,
            model.num_layers,
        )


def _is_pattern(shape: str) -> bool:
    return shape.endswith("query, key]")


def _over_generation(
    model: StandardizedTransformer,
    rows: list[Row],
    values: str | Iterable[str],
    layers: int | Iterable[int] | None,
    positions: Any,
    batch_size: int,
    device: str | torch.device,
    dtype: torch.dtype | None,
    progress: bool,
    max_new_tokens: int,
    generation: dict[str, Any],
) -> Collected:
    """The values at the positions from which each new token was predicted."""
    from nnterp.collection._generation import over_generation

    if positions is not None:
        raise ValueError(
            "positions is for prompts; over a generation, the positions that predicted the new tokens are read."
        )
    plan = make_plan(model, values, layers)
    return over_generation(model, rows, plan, batch_size, device, dtype, progress, max_new_tokens, generation)
