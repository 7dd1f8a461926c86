"""Values over a generation: at the positions from which each new token was predicted."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from nnterp.collection._collected import Collected
from nnterp.collection._ends import Ends, reads_padding
from nnterp.collection._filling import still_to_run
from nnterp.collection._generated import Generated
from nnterp.collection._plan import Plan
from nnterp.collection._reduce import Reduce
from nnterp.generation import check_generation, sequences_of
from nnterp.inputs import Batch, Row, batches, left_padded
from nnterp.named_transformer import NamedTransformer
from nnterp.progress import bar
from nnterp.resuming import Call


def over_generation(
    model: NamedTransformer,
    rows: list[Row],
    plan: Plan,
    batch_size: int,
    device: str | torch.device,
    dtype: torch.dtype | None,
    reduce: Reduce,
    progress: bool | None,
    max_new_tokens: int,
    generation: dict[str, Any],
    call: Call,
    earlier: Collected | None,
) -> Collected:
    """Generate from every row, reading the last position of each step.

    Raises:
        ValueError: A value has no entry per position at each step, `max_new_tokens` is not positive, or it is no plain
            generation (see `Ends`).
    """
    check_generation(max_new_tokens, generation)
    if generation.get("assistant_model") is not None:
        raise ValueError("collect() does not follow an assisted generation; leave assistant_model out.")
    patterns = [t.label for t in plan.targets if t.value.is_pattern]
    if patterns:
        raise ValueError(
            f"{patterns[0]} grows with every step of a generation; collect it over the finished text instead."
        )
    made = Generated(rows, plan, max_new_tokens, device, dtype, reduce)
    if earlier is not None:
        made.take_over(earlier)
    with (
        left_padded(model.tokenizer),
        bar(len(rows), "collect", progress, "prompt") as shown,
        call.keeping(lambda: made.collected(model.num_layers, call.record) if made.done else None),
    ):
        for batch in _batches(model, rows, batch_size, max_new_tokens, generation):
            left = still_to_run(model, batch, made.done)
            if left is not None:
                made.put(left.indices, *_generate(model, plan, left, made, max_new_tokens, generation))
            shown.update(len(batch))
    return made.collected(model.num_layers)


def _batches(
    model: NamedTransformer, rows: list[Row], batch_size: int, growth: int, generation: dict[str, Any]
) -> Iterator[Batch]:
    """The rows in batches; rows of one length only if settings of the generation read padding."""
    if not reads_padding(model._module, generation):
        yield from batches(model, rows, batch_size, growth)
        return
    lengths = sorted({len(row) for row in rows}, reverse=True)
    for length in lengths:
        mine = [i for i, row in enumerate(rows) if len(row) == length]
        for batch in batches(model, [rows[i] for i in mine], batch_size, growth):
            yield replace(batch, indices=tuple(mine[i] for i in batch.indices))


def _generate(
    model: NamedTransformer,
    plan: Plan,
    batch: Batch,
    made: Generated,
    max_new_tokens: int,
    generation: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor, dict[int, torch.Tensor]]:
    """The new token ids `[rows, tokens]`, which of them are a row's own, and target → `[rows, tokens, ...]`."""
    width, count = batch.input_ids.shape[1], len(batch)
    device, dtype = (None, None) if callable(made.reduce) else (made.device, made.dtype)
    with torch.no_grad(), warnings.catch_warnings(), Ends(model._module) as ends:
        warnings.simplefilter("ignore")  # a loop that every row's end token cuts short is expected
        with model.generate(max_new_tokens=max_new_tokens, **generation) as tracer:
            with tracer.invoke(batch.encoding):
                steps: list[dict[int, torch.Tensor]] = []
                steps.save()  # type: ignore[attr-defined]  # every object has it in a trace
                for _ in tracer.iter[:max_new_tokens]:
                    seen: dict[int, torch.Tensor] = {}
                    taken: dict[int, torch.Tensor] = {}
                    for i, place in enumerate(plan.reads):
                        seen[i] = place.read(model, str(place))
                        for t in plan.after[i]:
                            target = plan.targets[t]
                            tensor = target.combine([seen[p] for p in target.parts])
                            own = width + len(steps)
                            picked = last(tensor, count, target.label, target.value.axes, own)
                            picked = picked.softmax(-1) if target.last else picked
                            taken[t] = picked.to(device=device, dtype=dtype)
                    steps.append(taken)
            with tracer.invoke():
                answer = tracer.result.save()
    tokens = sequences_of(answer)[:, width:].cpu()
    new = tokens.shape[1]
    values = {t: torch.stack([step[t] for step in steps[:new]], dim=1) for t in range(len(plan.targets))}
    return tokens, ends.own(new), values


def last(tensor: torch.Tensor, rows: int, label: str, axes: int, length: int) -> torch.Tensor:
    """The last position of each row, `[rows, ...]`; `length` is that of a row so far."""
    if tensor.dim() < axes and tensor.shape[0] % rows == 0:  # batch and positions in one axis
        tensor = tensor.view(rows, -1, *tensor.shape[1:])
    if tensor.shape[0] != rows or tensor.dim() != axes:
        raise ValueError(f"{label} has shape {list(tensor.shape)} for {rows} rows, so it has no entry per position.")
    if tensor.shape[1] not in (1, length):
        raise ValueError(
            f"{label} has {tensor.shape[1]} positions in a step of the generation whose row has {length} tokens: this "
            f"model puts tokens of its own into its steps (XLNet: one to be predicted), so its last position is not "
            f"where a token was predicted from. Collect over the finished text instead."
        )
    return tensor[:, -1].clone()
