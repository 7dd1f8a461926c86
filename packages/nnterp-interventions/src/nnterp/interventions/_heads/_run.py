"""Running a plan in batches; attention is reduced inside the trace, one layer at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import nnsight
import torch

from nnterp.inputs import Batch, forward_flags
from nnterp.interventions._engine import Passing, forward_steps
from nnterp.interventions._heads._kinds import Plan
from nnterp.interventions._heads._reading import (
    ADDED,
    HEADS,
    LARGEST,
    OUTPUT,
    PATTERN,
    VALUES,
    Carried,
    added_by,
    by_head,
    carried,
    difference,
    mixing_error,
    refuse,
    summed,
    through_out,
    tolerance,
)
from nnterp.interventions._partial import DONE, unfinished
from nnterp.interventions._results import Result
from nnterp.interventions._running import BatchSize, in_batches
from nnterp.resuming import Call

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer

COPIED = 5  # a token is copied that is among so many most promoted ones (Wang et al., 2022)
COPYING = (PATTERN, VALUES, HEADS, OUTPUT, ADDED)  # what is read of a layer to tell what its heads copy
_RAW = "raw_"  # a partial result's tensors of single groups


class Run:
    """The batches of a plan.

    Attributes:
        found: By name, `[groups, layers, heads]` float32, NaN where nothing is read yet.
        done: Which rows of the plan are read.
    """

    def __init__(
        self, model: StandardizedTransformer, plan: Plan, layers: list[int], copying: bool, earlier: Result | None
    ) -> None:
        self.model, self.plan, self.layers = model, plan, layers
        self.order = sorted(set(layers))
        self.how = {layer: carried(model, layer) for layer in self.order} if copying else None
        for layer in self.order if copying else ():
            through_out(model, layer)
        self.found: dict[str, torch.Tensor] = {}
        self.done = torch.zeros(len(plan.rows), dtype=torch.bool)
        self.looks: list[list[Any]] = [[] for _ in plan.rows]
        for look in plan.looks:
            self.looks[look.row].append(look)
        if earlier is not None:
            self.done = earlier[DONE].clone()
            self.found = {n.removeprefix(_RAW): t.clone() for n, t in earlier.tensors.items() if n.startswith(_RAW)}

    def batches(self, batch_size: BatchSize, progress: bool | None, remote: Any) -> None:
        """Run what is not done."""
        left = [i for i in range(len(self.plan.rows)) if not self.done[i]]

        def step(batch: Batch) -> None:
            rows = [left[i] for i in batch.indices]
            self._keep(rows, _read(self.model, batch, [self.looks[i] for i in rows], self.order, self.how, remote))
            self.done[rows] = True

        if left:
            in_batches(self.model, [self.plan.rows[i] for i in left], batch_size, step, "head_scores", progress)

    def _keep(self, rows: list[int], read: dict[str, list[torch.Tensor]]) -> None:
        """Put the sums of a batch's groups, `[groups, heads]` for each layer, where they belong."""
        groups = _groups([self.looks[i] for i in rows])
        most = max(t.shape[1] for t in read["scores"])
        for name, tensors in read.items():
            if name not in self.found or self.found[name].shape[2] < most:
                shape = ((1 + self.plan.draws) * len(self.plan.prompts), len(self.order), most)
                self.found[name] = torch.full(shape, float("nan"))
            for k, tensor in enumerate(tensors):
                self.found[name][groups, k, : tensor.shape[1]] = tensor.cpu()

    def whole(self) -> dict[str, torch.Tensor]:
        """What is found, with the layers in the order in which they were asked for."""
        if not self.found:
            shape = ((1 + self.plan.draws) * len(self.plan.prompts), len(self.layers), 1)
            return {"scores": torch.full(shape, float("nan"))}
        back = [self.order.index(layer) for layer in self.layers]
        return {name: tensor[:, back] for name, tensor in self.found.items()}

    def partial(self, call: Call, make: Callable[[], Result]) -> Result | None:
        """What is computed so far, with the sums of each group; None if that is nothing."""
        whole = unfinished(call, make, self.done, ("rows",))
        if whole is None:
            return None
        whole.labels.update(rows=tuple(range(len(self.done))))
        for name, tensor in self.found.items():
            whole.tensors[_RAW + name], whole.axes[_RAW + name] = tensor.clone(), ("groups", "ordered", "counted")
            sizes = zip(("groups", "ordered", "counted"), tensor.shape, strict=True)
            whole.labels.update({axis: tuple(range(size)) for axis, size in sizes})
        return whole


def _groups(looks: list[list[Any]]) -> list[int]:
    """The groups that these rows' looks belong to, each once."""
    return sorted({look.group for own in looks for look in own})


@torch.no_grad()
def _read(
    model: StandardizedTransformer,
    batch: Batch,
    looks: list[list[Any]],
    layers: list[int],
    how: dict[int, Carried] | None,
    remote: Any,
) -> dict[str, list[torch.Tensor]]:
    """Sums over each group's looks of a batch, `[groups, heads]` for each layer, by name.

    Raises:
        Unavailable: What a layer's heads write is not what it is taken for.
    """
    groups = _groups(looks)
    flat = [(row, look) for row, own in enumerate(looks) for look in own]
    rows = torch.tensor([row for row, _ in flat])
    queries = torch.tensor([batch.starts[row] + look.query for row, look in flat])
    keys = torch.tensor([batch.starts[row] + look.key for row, look in flat])
    tokens = torch.tensor([batch.rows[row].ids[look.key] for row, look in flat])
    into = torch.tensor([groups.index(look.group) for _, look in flat])
    weights = torch.tensor([look.weight for _, look in flat])
    if how is None:
        return {"scores": _attention(model, batch, layers, (rows, queries, keys, into, weights), len(groups), remote)}
    spots, back = torch.stack([rows, keys, tokens]).unique(dim=1, return_inverse=True)
    attention, copies, errors = _copying(model, batch, layers, (rows, queries, keys), spots, how, remote)
    limit = tolerance(next(model._module.parameters()).dtype)
    for what, found in zip(
        (
            "a head's output is not its attention times its values",
            "a head's part of the stream cannot be read by itself",
        ),
        zip(*errors, strict=True),
        strict=True,
    ):
        refuse(model, dict(zip(layers, map(float, found), strict=True)), limit, what)
    copied = [c[back.to(c.device)].float() for c in copies]
    once = 1 / torch.bincount(into, minlength=len(groups))[into]
    pairs = [(a.to(c.device).float(), c) for a, c in zip(attention, copied, strict=True)]
    return {
        "scores": [summed(a * c, into, weights, len(groups)) for a, c in pairs],
        "attention": [summed(a, into, weights, len(groups)) for a, _ in pairs],
        "copying": [summed(c, into, once, len(groups)) for _, c in pairs],
    }


def _attention(
    model: StandardizedTransformer,
    batch: Batch,
    layers: list[int],
    looks: tuple[torch.Tensor, ...],
    groups: int,
    remote: Any,
) -> list[torch.Tensor]:
    """The patterns of a batch, summed up by group: `[groups, heads]` for each layer."""
    row, query, key, into, weights = looks
    with model.trace(batch.encoding, remote=remote, **forward_flags(model)) as tracer:
        sums, passing = [], Passing(model)
        for layer in layers:
            pattern = passing.read((PATTERN, layer))
            at = (row.to(pattern.device), slice(None), query.to(pattern.device), key.to(pattern.device))
            sums.append(summed(pattern[at], into, weights, groups))
        nnsight.save(sums)
        tracer.stop()
    return sums


def _copying(
    model: StandardizedTransformer,
    batch: Batch,
    layers: list[int],
    looks: tuple[torch.Tensor, ...],
    spots: torch.Tensor,
    how: dict[int, Carried],
    remote: Any,
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[tuple[torch.Tensor, torch.Tensor]]]:
    """What heads attend to and copy in a batch.

    Args:
        model, batch, layers, how, remote: As in `_read`.
        looks: Row, query and key of each look.
        spots: Row, key and token of each position whose copying is asked for, `[3, spots]`.

    Returns:
        For each layer the attention `[looks, heads]`; whether the token is copied, `[spots, heads]`; and two errors.
    """
    row, query, key = looks
    steps = forward_steps(model, [(name, layer) for layer in layers for name in COPYING])
    most = max(1, LARGEST // (model.vocab_size or 1 << 16))  # a remote worker does not know the vocabulary's size
    tokens, own, count = spots[2], batch.attention_mask.bool(), len(COPYING)
    with model.trace(batch.encoding, remote=remote, **forward_flags(model)) as tracer:
        passing, read = Passing(model), {}
        attention, messages, errors = [], [], []
        for step in steps:
            if step.term is not None:
                passing.hold(step)
                continue
            name, layer = step.key
            assert isinstance(layer, int)
            read[name] = passing.read(step.key)
            if len(read) < count:
                continue
            pattern, device = read[PATTERN], read[PATTERN].device
            values = by_head(read[VALUES], pattern.shape[1])
            attention.append(pattern[row.to(device), :, query.to(device), key.to(device)])
            mixed = mixing_error(pattern, values, read[HEADS], own)
            alone = values[spots[0].to(values.device), spots[1].to(values.device)]
            messages.append(added_by(model, layer, alone, how[layer]))
            errors.append((mixed, difference(how[layer].through(model, read[OUTPUT], True), read[ADDED], own)))
            read = {}
        copies = [copied(model, message, tokens, most) for message in messages]
        nnsight.save(attention)
        nnsight.save(errors)
        nnsight.save(copies)
        tracer.stop()
    return attention, copies, errors


def copied(model: Any, messages: torch.Tensor, tokens: torch.Tensor, most: int) -> torch.Tensor:
    """Whether the token of each spot is among those that `[spots, heads, hidden]` promotes most: `[spots, heads]`."""
    spots, heads, _ = messages.shape
    flat, ids = messages.flatten(0, 1), tokens.repeat_interleave(heads)
    parts = []
    for start in range(0, len(flat), most):
        logits = model.project_on_vocab(flat[start : start + most]).float()
        own = logits.gather(-1, ids[start : start + most, None].to(logits.device))
        parts.append((logits >= own).sum(-1) <= COPIED)  # what promotes nothing copies nothing
    return torch.cat(parts).view(spots, heads)
