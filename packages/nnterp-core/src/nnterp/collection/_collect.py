"""Read values of many prompts in one pass, in batches, stopping after the last layer needed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch

from nnterp.collection._collected import Collected
from nnterp.collection._filling import Filling
from nnterp.collection._generation import over_generation
from nnterp.collection._plan import Plan, make_plan
from nnterp.collection._reduce import Reduce, reduced
from nnterp.collection._select import select
from nnterp.defaults import plain_defaults
from nnterp.indices import Indices
from nnterp.inputs import Batch, Row, batches, encode, forward_flags, left_padded
from nnterp.named_transformer import NamedTransformer
from nnterp.positions import is_one_position, per_prompt, plain_positions, resolve
from nnterp.progress import bar


@plain_defaults()
def collect(
    model: NamedTransformer,
    prompts: Any,
    values: str | Iterable[str],
    layers: Indices = None,
    positions: Any = None,
    batch_size: int = 16,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    reduce: Reduce = None,
    progress: bool | None = None,
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
        if positions is not None:
            raise ValueError(
                "positions is for prompts; over a generation, the positions that predicted the new tokens are read."
            )
        plan = make_plan(model, values, layers)
        return over_generation(model, rows, plan, batch_size, device, dtype, progress, max_new_tokens, generation)
    if generation:
        raise TypeError(
            f"collect() got {', '.join(generation)}; these are settings of a generation, which needs max_new_tokens=."
        )
    plan = make_plan(model, values, layers)
    chosen, single = positions_of(model, rows, positions)
    result = Filling(plan, rows, chosen, single, device, dtype, reduce)
    with (
        left_padded(model.tokenizer),
        bar(len(rows), "collect", progress, "prompt") as shown,
    ):
        for batch in batches(model, rows, batch_size):
            try:
                result.put(batch, _one_batch(model, plan, result, batch, remote))
            except BaseException as error:
                if result.done:
                    error.collected = result.collected(model.num_layers)  # type: ignore[attr-defined]
                    error.add_note(
                        f"{len(result.done)} of {len(rows)} prompts are finished: see error.collected and its `done`."
                    )
                raise
            shown.update(len(batch))
    return result.collected(model.num_layers)


def positions_of(model: NamedTransformer, rows: Sequence[Row], positions: Any) -> tuple[list[tuple[int, ...]], bool]:
    """For each row the positions asked for, and whether they are one position, which has no axis.

    Raises:
        IndexError, ValueError: A row has no such position; names the row, its length and its tokens.
        TypeError: It is no position.
    """
    plain = plain_positions(positions)
    each = per_prompt(plain, len(rows))
    chosen = [resolve(model, row, mine, f"Prompt {i}") for i, (row, mine) in enumerate(zip(rows, each, strict=True))]
    return chosen, is_one_position(plain)


def _one_batch(
    model: NamedTransformer, plan: Plan, result: Filling, batch: Batch, remote: Any
) -> dict[int, torch.Tensor]:
    """One forward pass as far as it is needed: what each target is made into."""
    picked, reduce, dtype = result.pick(batch), result.reduce, result.dtype
    device = torch.device("cpu") if remote else result.device
    targets = [(t.combine, t.parts, t.label, t.value.shape) for t in plan.targets]
    steps = list(zip(plan.reads, plan.after, plan.last_use, strict=True))
    inputs = {**batch.encoding, **forward_flags(model)}
    finish: Any = partial(reduced, reduce) if callable(reduce) else None  # what is not used does not travel
    with torch.no_grad(), model.trace(inputs, remote=remote) as tracer:
        seen: dict[int, torch.Tensor] = {}
        taken: dict[int, torch.Tensor] = {}
        taken.save()  # type: ignore[attr-defined]  # every object has it in a trace
        for i, (place, complete, dropped) in enumerate(steps):
            seen[i] = place.read(model, str(place))
            for t in complete:
                combine, parts, label, shape = targets[t]
                tensor = select(combine([seen[p] for p in parts]), picked, label, shape)
                tensor = tensor.detach() if finish is None else finish(tensor, picked, shape)
                taken[t] = tensor.to(device=device, dtype=dtype)
            for p in dropped:
                del seen[p]
        tracer.stop()
    return taken
