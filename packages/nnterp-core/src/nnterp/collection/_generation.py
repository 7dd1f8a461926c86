"""Values over a generation: at the positions from which each new token was predicted."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch

from nnterp.collection._collect import left_padded
from nnterp.collection._collected import Collected
from nnterp.collection._plan import Plan
from nnterp.inputs import Row, batches

if TYPE_CHECKING:
    from nnterp.standardized_transformer import StandardizedTransformer


def over_generation(
    model: StandardizedTransformer,
    rows: list[Row],
    plan: Plan,
    batch_size: int,
    device: str | torch.device,
    dtype: torch.dtype | None,
    progress: bool,
    max_new_tokens: int,
    generation: dict[str, Any],
) -> Collected:
    """Generate from every row, reading the last position of each step.

    Raises:
        ValueError: A value has no entry per position at each step, or `max_new_tokens` is not positive.
    """
    from tqdm.auto import tqdm

    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, not {max_new_tokens}.")
    patterns = [t.label for t in plan.targets if t.value.shape.endswith("query, key]")]
    if patterns:
        raise ValueError(
            f"{patterns[0]} grows with every step of a generation; collect it over the finished text instead."
        )
    total = [None] * len(plan.targets)  # type: list[torch.Tensor | None]
    tokens = torch.full((len(rows), max_new_tokens), -1, dtype=torch.long)
    mask = torch.zeros(len(rows), max_new_tokens, dtype=torch.bool)
    ends = _end_tokens(model, generation)
    with (
        left_padded(model),
        tqdm(total=len(rows), desc="collect", unit="prompt", disable=not progress or len(rows) <= batch_size) as bar,
    ):
        for batch in batches(model, rows, batch_size):
            width, count = batch.input_ids.shape[1], len(batch)
            with torch.no_grad(), warnings.catch_warnings():
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
                                    own = width + len(steps) + model.readout.layout.extra
                                    picked = last(tensor, count, target.label, target.value.axes, own)
                                    taken[t] = picked.to(device=device, dtype=dtype)
                            steps.append(taken)
                    with tracer.invoke():
                        answer = tracer.result.save()
            made = answer[:, width:].cpu()
            index = torch.tensor(batch.indices)
            tokens[index, : made.shape[1]] = made
            mask[index] = _real(made, ends, max_new_tokens)
            for step, taken_ in enumerate(steps):
                for t, tensor in taken_.items():
                    into = total[t]
                    if into is None:
                        into = total[t] = tensor.new_zeros(len(rows), max_new_tokens, *tensor.shape[1:])
                    into[index.to(into.device), step] = tensor
            bar.update(count)
    longest = int(mask.sum(1).max())
    tokens, mask = tokens[:, :longest], mask[:, :longest]
    tensors: dict[str, Any] = {}
    for t, target in enumerate(plan.targets):
        whole = total[t]
        assert whole is not None
        shape = (*mask.shape, *([1] * (whole.dim() - 2)))
        whole = whole[:, :longest].masked_fill(~mask.to(whole.device).view(shape), 0)
        if target.layer is None:
            tensors[target.value.name] = whole
        else:
            tensors.setdefault(target.value.name, {})[target.layer] = whole
    for name, mine in tensors.items():
        if isinstance(mine, dict) and len({tuple(x.shape) for x in mine.values()}) == 1:
            tensors[name] = torch.stack([mine[i] for i in plan.layers[name]])
    positions = tuple(
        tuple(range(len(row) - 1, len(row) - 1 + int(m.sum()))) for row, m in zip(rows, mask, strict=True)
    )
    return Collected(
        tensors,
        plan.layers,
        positions,
        None if bool(mask.all()) else mask,
        tuple(rows),
        tokens.masked_fill(~mask, -1),
        set(range(len(rows))),
        model.num_layers,
    )


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


def _end_tokens(model: StandardizedTransformer, generation: dict[str, Any]) -> set[int]:
    given = generation.get("eos_token_id", getattr(model._module.generation_config, "eos_token_id", None))
    if given is None:
        return set()
    return {given} if isinstance(given, int) else set(given)


def _real(made: torch.Tensor, ends: set[int], width: int) -> torch.Tensor:
    """Which new tokens are a row's own: up to and with its end token."""
    mask = torch.zeros(made.shape[0], width, dtype=torch.bool)
    for i, row in enumerate(made.tolist()):
        stop = next((k + 1 for k, token in enumerate(row) if token in ends), len(row))
        mask[i, :stop] = True
    return mask
