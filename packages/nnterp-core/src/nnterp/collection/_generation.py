"""Values over a generation: at the positions from which each new token was predicted."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from tqdm.auto import tqdm

from nnterp.collection._collected import Collected
from nnterp.collection._filling import stacked
from nnterp.collection._plan import Plan
from nnterp.inputs import Batch, Row, batches, left_padded
from nnterp.named_transformer import NamedTransformer


def over_generation(
    model: NamedTransformer,
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
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, not {max_new_tokens}.")
    patterns = [t.label for t in plan.targets if t.value.is_pattern]
    if patterns:
        raise ValueError(
            f"{patterns[0]} grows with every step of a generation; collect it over the finished text instead."
        )
    made = _Made(rows, plan, max_new_tokens, _end_tokens(model, generation))
    with (
        left_padded(model.tokenizer),
        tqdm(total=len(rows), desc="collect", unit="prompt", disable=not progress or len(rows) <= batch_size) as bar,
    ):
        for batch in batches(model, rows, batch_size):
            answer, steps = _generate(model, plan, batch, device, dtype, max_new_tokens, generation)
            made.put(batch, answer[:, batch.input_ids.shape[1] :].cpu(), steps)
            bar.update(len(batch))
    return made.collected(model.num_layers)


def _generate(
    model: NamedTransformer,
    plan: Plan,
    batch: Batch,
    device: str | torch.device,
    dtype: torch.dtype | None,
    max_new_tokens: int,
    generation: dict[str, Any],
) -> tuple[torch.Tensor, list[dict[int, torch.Tensor]]]:
    """Token ids of prompts and answers, `[rows, seq]`; and for each step, target → `[rows, ...]`."""
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
    return answer, steps


class _Made:
    """What was generated, and the values at each step, filled in batch by batch."""

    def __init__(self, rows: list[Row], plan: Plan, width: int, ends: set[int]) -> None:
        self.rows, self.plan, self.width, self.ends = rows, plan, width, ends
        self.values: dict[int, torch.Tensor] = {}
        self.tokens = torch.full((len(rows), width), -1, dtype=torch.long)
        self.mask = torch.zeros(len(rows), width, dtype=torch.bool)

    def put(self, batch: Batch, tokens: torch.Tensor, steps: list[dict[int, torch.Tensor]]) -> None:
        """Write a batch to where its prompts belong."""
        index = torch.tensor(batch.indices)
        self.tokens[index, : tokens.shape[1]] = tokens
        self.mask[index] = _real(tokens, self.ends, self.width)
        for step, taken in enumerate(steps):
            for t, tensor in taken.items():
                if t not in self.values:
                    self.values[t] = tensor.new_zeros(len(self.rows), self.width, *tensor.shape[1:])
                into = self.values[t]
                into[index.to(into.device), step] = tensor

    def collected(self, num_layers: int) -> Collected:
        """The finished result."""
        longest = int(self.mask.sum(1).max())
        tokens, mask = self.tokens[:, :longest], self.mask[:, :longest]
        found = {}
        for t, target in enumerate(self.plan.targets):
            whole = self.values[t][:, :longest]
            shape = (*mask.shape, *([1] * (whole.dim() - 2)))
            found[target.value.name, target.layer] = whole.masked_fill(~mask.to(whole.device).view(shape), 0)
        ends = [len(row) - 1 for row in self.rows]
        positions = tuple(tuple(range(end, end + int(m.sum()))) for end, m in zip(ends, mask, strict=True))
        return Collected(
            stacked(found, self.plan),
            self.plan.layers,
            positions,
            mask,
            tuple(self.rows),
            tokens.masked_fill(~mask, -1),
            set(range(len(self.rows))),
            num_layers,
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


def _end_tokens(model: NamedTransformer, generation: dict[str, Any]) -> set[int]:
    given = generation.get(
        "eos_token_id", getattr(getattr(model._module, "generation_config", None), "eos_token_id", None)
    )
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
