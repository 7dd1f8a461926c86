"""One forward pass of a batch, as far as it is needed, and what is read of it."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from nnterp.collection._plan import Plan
from nnterp.collection._reduce import Reduce, reduced
from nnterp.collection._select import Selection, last_of, select
from nnterp.devices import input_device
from nnterp.inputs import Batch, forward_flags
from nnterp.memory import require_memory, size_of
from nnterp.named_transformer import NamedTransformer


def read_batch(
    model: NamedTransformer,
    plan: Plan,
    batch: Batch,
    picked: Selection,
    device: str | torch.device | None,
    dtype: torch.dtype | None,
    reduce: Reduce = None,
    remote: Any = False,
) -> dict[int, torch.Tensor]:
    """Run one batch, and read what the plan wants.

    Args:
        model: The model.
        plan: What to read.
        batch: The rows.
        picked: Their positions.
        device: Where the tensors go; with None they stay where they were computed.
        dtype: Their dtype; the model's if None.
        reduce: A function that is applied to each; "mean" and "sum" are left to the caller.
        remote: Run on the remote service; the tensors are then on the CPU.

    Returns:
        Number of the target → what it is made into, `[rows, (positions,) ...]`, on `device` and in `dtype`.

    Raises:
        MemoryError: Attention patterns are read, and those of one layer do not fit into memory.
    """
    if not remote:
        require_room_for_patterns(model, plan, batch)
    ends = last_of(batch)
    device = torch.device("cpu") if remote else device
    targets = [(t.combine, t.parts, t.label, t.value.shape, t.last) for t in plan.targets]
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
                combine, parts, label, shape, at_end = targets[t]
                own = ends if at_end else picked
                tensor = select(combine([seen[p] for p in parts]), own, label, shape)
                tensor = tensor.softmax(-1) if at_end else tensor
                tensor = tensor.detach() if finish is None else finish(tensor, own, shape)
                taken[t] = tensor.to(device=device, dtype=dtype)
            for p in dropped:
                del seen[p]
        tracer.stop()
    return taken


def require_room_for_patterns(model: NamedTransformer, plan: Plan, batch: Batch) -> None:
    """Raise MemoryError if the attention of one layer does not fit, where attention probabilities or scores are read.

    Eager attention holds scores, probabilities and their float32 copies of `[batch, heads, query, key]` at once.
    """
    if not any(target.value.is_pattern for target in plan.targets) or model.num_heads is None:
        return
    rows, width = batch.input_ids.shape
    needed = 3 * size_of((rows, model.num_heads, width, width), torch.float32)
    what = f"Attention of {rows} prompts of {width} tokens, {model.num_heads} heads, in one layer"
    require_memory(needed, input_device(model._module), what, "Lower batch_size, or shorten the prompts.")
