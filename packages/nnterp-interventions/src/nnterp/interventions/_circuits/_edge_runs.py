"""Runs in which edges are cut: each input reads a stream of its own, made of writes of this run and of another one.

Along the edges that are kept, an input reads what the writer writes in this run; along all others, what it wrote in
the other run. Rows of one batch hold the streams of one layer: inputs that keep the same edges share a row. The
queries, keys and values of the rows are put together before attention, so that every row goes on as one run.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from nnterp.inputs import forward_flags
from nnterp.interventions._attribution import accumulated
from nnterp.interventions._circuits._graph import HEAD_INPUTS, Block, Graph
from nnterp.interventions._circuits._readings import Reading, attention_parts, keys_of, stream_of
from nnterp.interventions._engine import Passing, forward_steps, rows_of
from nnterp.interventions._running import AUTO_ROWS, within_memory
from nnterp.values import get_label, write_value

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer

MOST_NUMBERS = 1 << 27  # of what all writers write in the runs of one batch


class EdgeRuns:
    """Runs of some prompts with edges cut.

    Args:
        model: The model.
        graph: Its graph.
        ids: The prompts, `[pairs, seq]`.
        other: The run whose writes are read along the edges that are cut, of as many prompts of the same length.
        writes: What was written in it, `[writers, pairs, seq, hidden]`.
        rows: Most rows of a batch.
    """

    def __init__(
        self,
        model: StandardizedTransformer,
        graph: Graph,
        ids: torch.Tensor,
        other: Reading,
        writes: torch.Tensor,
        rows: int = AUTO_ROWS,
    ) -> None:
        self.model, self.graph, self.ids, self.other, self.writes, self.rows = model, graph, ids, other, writes, rows

    def logits(self, kept: torch.Tensor) -> torch.Tensor:
        """Next-token logits of runs with some edges kept.

        Args:
            kept: Which edges each run keeps, bool `[runs, inputs, writers]`.

        Returns:
            `[runs, pairs, vocab]`, float32, on the model's device.
        """
        slots = [_Slots(self.graph, own) for own in kept & self.graph.possible]
        most = max(1, MOST_NUMBERS // self.writes.numel())
        found: list[torch.Tensor] = []
        while len(found) < len(slots):
            count = 0
            while count < min(most, len(slots) - len(found)):
                some = slots[len(found) : len(found) + count + 1]
                if count and len(some) * max(own.count for own in some) * len(self.ids) > self.rows:
                    break
                count += 1
            chosen = slots[len(found) : len(found) + count]
            step = partial(self._some, chosen, found)
            if not within_memory(step, count):
                most = max(1, count // 2)
        return torch.stack(found)

    @torch.no_grad()
    def _some(self, slots: Sequence[_Slots], found: list[torch.Tensor]) -> None:
        """Some runs in one batch."""
        model = self.model
        batch = _Batch(self, slots)
        steps = forward_steps(model, keys_of(self.graph.blocks, True))
        readout, inputs = model.readout.proven, {"input_ids": batch.ids, **forward_flags(model)}
        with model.trace(inputs) as tracer:
            passing = Passing(model)
            for step in steps:
                if step.term is not None:
                    passing.hold(step)
                else:
                    batch.at(passing, step.key)
            if readout:
                last = batch.final[:, :, -1].save()
                tracer.stop()
            else:
                last = batch.first_of(model.logits[:, -1]).save()
        logits = (model.project_on_vocab(last) if readout else last).float()
        found += list(logits)


class _Slots:
    """How the inputs of one run share rows.

    Attributes:
        kept: The edges, bool `[inputs, writers]`.
        sets: For each layer, the sets of edges of the streams that its rows hold, bool `[rows, writers]`.
        slot: For each input that reads what a layer is given, the row that holds its stream.
        count: Rows of the layer that needs most.
    """

    def __init__(self, graph: Graph, kept: torch.Tensor) -> None:
        self.kept = kept
        self.sets: dict[int, torch.Tensor] = {}
        self.slot: dict[int, int] = {}
        for block in graph.blocks:
            roles: list[str] = [*HEAD_INPUTS, "mixer", *["mlp"] * (block.mlp == "input")]
            own = [i for role in roles for i in graph.inputs_of.get((block.layer, role), ())]
            if own:
                self.sets[block.layer], where = kept[own].unique(dim=0, return_inverse=True)
                self.slot.update(zip(own, where.tolist(), strict=True))
        self.count = max((len(sets) for sets in self.sets.values()), default=1)


class _Batch:
    """The state of a batch of runs, `[runs, slots, pairs]` in one axis of rows, as it goes through the model.

    Attributes:
        changes: What each writer writes in these runs less what it wrote in the other run, `[runs, writers, pairs, seq,
            hidden]`; zero until the writer is passed.
        final: The stream after the last layer, `[runs, pairs, seq, hidden]`.
    """

    def __init__(self, own: EdgeRuns, slots: Sequence[_Slots]) -> None:
        self.model, self.graph, self.other, self.writes = own.model, own.graph, own.other, own.writes
        self.slots = slots
        pairs, self.seq = own.ids.shape
        self.shape = len(slots), max(some.count for some in slots), pairs
        self.rows = self.shape[0] * self.shape[1] * pairs
        self.ids = own.ids.repeat(self.shape[0] * self.shape[1], 1)
        self.kept = torch.stack([some.kept for some in slots]).to(self.writes)
        self.changes = self.writes.new_zeros(self.shape[0], *self.writes.shape)
        self.blocks = {block.layer: block for block in self.graph.blocks}
        self.heads: torch.Tensor | None = None
        self.final: torch.Tensor = self.writes

    def at(self, passing: Passing, key: Any) -> None:
        """Read or write one value that the forward pass has come to."""
        name, layer = key
        block, current = self.blocks[layer], passing.read(key)
        rows = rows_of(current, self.rows, self.seq, get_label(name))
        if name == "layers_input":
            if layer == self.graph.blocks[0].layer:
                self.note(layer, "embeddings", self.first_of(rows)[None])
            self.write(name, layer, current, self.given(block))
        elif name in HEAD_INPUTS.values():
            self.write(name, layer, current, self.together(name, layer, rows))
        elif name == "attention_head_outputs":
            self.heads = self.first_of(rows).flatten(0, 1)
        elif name == "attention_contributions":
            assert self.heads is not None
            parts = attention_parts(self.model, block, self.heads, self.first_of(rows).flatten(0, 1))
            for role, part in zip(("head", "bias"), parts, strict=False):
                self.note(layer, role, part.unflatten(1, (self.shape[0], self.shape[2])))
        elif name == "mixer_contributions":
            self.note(layer, "mixer", self.slot_of(layer, "mixer", rows)[None])
        elif name == "layers_mid":
            (own,) = self.graph.inputs_of[layer, "mlp"]
            stream = self.stream(block, "mlp", self.kept[:, [own]])
            self.write(name, layer, current, stream.expand(-1, self.shape[1], -1, -1, -1))
        elif name == "mlp_contributions":
            made = self.first_of(rows) if block.mlp == "mid" else self.slot_of(layer, "mlp", rows)
            self.note(layer, "mlp", made[None])
        else:
            (own,) = self.graph.inputs_of[layer, "logits"]
            stream = self.stream(block, "logits", self.kept[:, [own]])
            self.final = stream[:, 0].to(current)
            if not self.model.readout.proven:
                self.write(name, layer, current, stream.expand(-1, self.shape[1], -1, -1, -1))

    def write(self, name: str, layer: int, current: torch.Tensor, new: torch.Tensor) -> None:
        """Write `[runs, slots, pairs, seq, ...]`."""
        write_value(self.model, get_label(name), new.reshape(current.shape).to(current), layer)

    def note(self, layer: int, role: str, made: torch.Tensor) -> None:
        """Take up what nodes write, `[nodes, runs, pairs, seq, hidden]`."""
        own = self.graph.writers_of[layer, role]
        self.changes[:, own] = accumulated(made).to(self.changes).movedim(0, 1) - self.writes[own]

    def given(self, block: Block) -> torch.Tensor:
        """The streams of the rows that enter a layer, `[runs, slots, pairs, seq, hidden]`."""
        sets = self.kept.new_zeros(self.shape[0], self.shape[1], self.kept.shape[2])
        for run, slots in enumerate(self.slots):
            own = slots.sets.get(block.layer)
            if own is not None:
                sets[run, : len(own)] = own.to(sets)
        return self.stream(block, "", sets)

    def stream(self, block: Block, role: str, sets: torch.Tensor) -> torch.Tensor:
        """The streams for sets of edges `[runs, n, writers]`: `[runs, n, pairs, seq, hidden]`."""
        base = accumulated(stream_of(self.other, block, role)).to(self.changes)
        added = torch.bmm(sets, self.changes.flatten(2))
        return base + added.unflatten(2, self.changes.shape[2:])

    def by_slot(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows as `[runs, slots, pairs, ...]`."""
        return rows.unflatten(0, self.shape)

    def first_of(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows of the first slot, `[runs, pairs, ...]`."""
        return self.by_slot(rows)[:, 0]

    def slot_of(self, layer: int, role: str, rows: torch.Tensor) -> torch.Tensor:
        """The rows of the one input of a role, `[runs, pairs, ...]`."""
        (own,) = self.graph.inputs_of[layer, role]
        return self.by_slot(rows)[range(self.shape[0]), [some.slot[own] for some in self.slots]]

    def together(self, name: str, layer: int, rows: torch.Tensor) -> torch.Tensor:
        """Queries, keys or values in which each head is that of its own row, the same in all slots."""
        role = next(role for role, value in HEAD_INPUTS.items() if value == name)
        own = self.graph.inputs_of[layer, role]
        slot = torch.tensor([[some.slot[i] for i in own] for some in self.slots], device=rows.device)
        runs = torch.arange(self.shape[0], device=rows.device)[:, None]
        heads = torch.arange(len(own), device=rows.device)[None]
        chosen = self.by_slot(rows)[runs, slot, :, :, heads]  # [runs, heads, pairs, seq, head_dim]
        return chosen.movedim(1, 3).unsqueeze(1).expand(-1, self.shape[1], *(-1,) * 4)
