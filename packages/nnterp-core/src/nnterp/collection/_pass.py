"""One forward pass of a batch, as far as it is needed, and what is read of it."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from nnterp.collection._plan import Plan
from nnterp.collection._reduce import Reduce, reduced
from nnterp.collection._select import Selection, last_of, select
from nnterp.inputs import Batch, forward_flags
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
    """Run one batch and return what each target of the plan is made into, `[rows, (positions,) ...]`.

    Args:
        model: The model.
        plan: What to read.
        batch: The rows.
        picked: Their positions.
        device: Where the tensors go; with None they stay where they were computed.
        dtype: Their dtype; the model's if None.
        reduce: A function that is applied to each; "mean" and "sum" are left to the caller.
        remote: Run on the remote service; the tensors are then on the CPU.
    """
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
