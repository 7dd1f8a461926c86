"""Find the stream between a layer's two parts: the operation whose result the feed-forward and the residual path read.

A write to the input of the feed-forward's norm would not reach the residual path. The sum of stream and attention is an
operation in the layer's forward. It is found by its numbers and proven by a write. `bracket_one` then instruments that
operation alone, for every later run, so that it can be read even if the layer has already begun.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from nnterp.anatomy import Layer
from nnterp.discovery._probe import Probe
from nnterp.discovery._quiet import quiet
from nnterp.discovery._recording import Edits, Labels, Operation, Recording
from nnterp.discovery._residual import ResidualStructure
from nnterp.tensors import same
from nnterp.traced import Inside, bracket_one

PROBE = (1, 5)
COMPILED: dict[tuple[Any, str], Any] = {}  # forwards with one instrumented operation, for all models of the process
MAX_TRIES = 6  # few operations hold the stream's numbers, and the first is nearly always right


def find_between(probe: Probe, structures: tuple[ResidualStructure, ...]) -> tuple[Inside | None, ...]:
    """Find the operation that makes the stream between the parts of each layer, and instrument it.

    An operation is proven by a write: what is added to its output must arrive in the feed-forward's input and in the
    stream that the feed-forward's output is added to.

    Args:
        probe: A prompt of one row.
        structures: The proven residual structure of each layer.

    Returns:
        Per layer, the operation; None where there is none.
    """
    search = _Search(probe, structures)
    if search.wanted:
        with quiet(probe.module):
            search.by_kind()
            search.one_by_one()
    return tuple(search.found.get(layer.index) for layer in probe.anatomy.blocks)


class _Search:
    """The search over the layers of one model."""

    def __init__(self, probe: Probe, structures: tuple[ResidualStructure, ...]) -> None:
        self.probe, self.root = probe, probe.module
        self.found: dict[int, Inside] = {}
        self.wanted: dict[int, _Between] = {
            layer.index: _Between(layer, structure, _with_code(self.root, layer.path))
            for layer, structure in zip(probe.anatomy.blocks, structures, strict=False)
            if structure.mid is not None and structure.mid_side == "input"
        }

    def by_kind(self) -> None:
        """Search the first layer of each kind, and try the operation found there in all layers of that kind.

        Layers of one kind run the same code. The forward pass of the search stops after the last layer it needs.
        """
        kinds: dict[tuple, list[int]] = {}
        for index, between in self.wanted.items():
            kinds.setdefault(between.kind(self.root), []).append(index)
        first = [indices[0] for indices in kinds.values()]
        if len(first) == len(self.wanted):
            return
        recording = self.record([self.wanted[i] for i in first], until=self.wanted[max(first)].layer)
        trying: dict[int, tuple[str, Labels]] = {}
        for indices in kinds.values():
            one = self.wanted[indices[0]]
            options = one.candidates(recording.of(one.of), self.probe.tolerance)
            if options:
                path, labels = options[0]
                trying |= {i: (self.wanted[i].layer + path.removeprefix(one.layer), labels) for i in indices}
        self.try_out(trying)

    def one_by_one(self) -> None:
        """Search each layer without a proven operation, and try its candidates one after the other."""
        left = {i: between for i, between in self.wanted.items() if i not in self.found}
        if not left:
            return
        recording = self.record(list(left.values()))
        tolerance = self.probe.tolerance
        options = {i: between.candidates(recording.of(between.of), tolerance) for i, between in left.items()}
        for turn in range(MAX_TRIES):
            trying = {i: mine[turn] for i, mine in options.items() if turn < len(mine) and i not in self.found}
            if not trying:
                break
            self.try_out(trying)

    def try_out(self, trying: dict[int, tuple[str, Labels]]) -> None:
        """Write to one operation in each of some layers; keep and instrument those that are proven."""
        if not trying:
            return
        edits = dict.fromkeys(trying.values(), _moved)
        whole = self.record([self.wanted[i] for i in trying], edits=edits)
        for index, (path, labels) in trying.items():
            recording = whole.of(self.wanted[index].of)
            operation = next((o for o in recording.operations_of(path) if o.labels == labels), None)
            proven = self.wanted[index].is_moved(operation, recording, self.probe.tolerance)
            if proven and bracket_one(self.root.get_submodule(path), labels[0], COMPILED):
                self.found[index] = Inside(path, labels)

    def record(self, layers: list[_Between], until: str | None = None, edits: Edits | None = None) -> Recording:
        operations = [path for path, _ in edits] if edits else [path for one in layers for path in one.paths]
        return self.probe.record(
            until,
            modules=dict.fromkeys(path for one in layers for path in one.edges()),
            operations=dict.fromkeys(operations),
            look_into=lambda function: False,
            edits=edits,
            edited_alone=edits is not None,
            arguments=False,
        )


def _moved(output: torch.Tensor) -> torch.Tensor:
    """The stream plus one random vector of about its size, the same at every position."""
    generator = torch.Generator().manual_seed(0)
    step = torch.randn(output.shape[-1], generator=generator).to(output)
    return output + step * output.detach().float().std().clamp(min=1e-3).to(output.dtype)


def _with_code(root: nn.Module, layer: str) -> list[str]:
    """A layer and the modules in it that have code of their own: neither torch's nor a norm."""
    paths = [layer]
    for name, module in root.get_submodule(layer).named_modules():
        known = type(module).__module__.startswith("torch.") or (
            "norm" in type(module).__name__.lower() and not list(module.children())
        )
        if name and not known and name.count(".") < 2:
            paths.append(f"{layer}.{name}")
    return paths


class _Between:
    """The search for the stream between the two parts of one layer."""

    def __init__(self, layer: Layer, structure: ResidualStructure, paths: list[str]) -> None:
        self.of, self.layer, self.structure, self.paths = layer, layer.path, structure, paths
        self.before: tuple[torch.Tensor, torch.Tensor] | None = None

    def kind(self, root: nn.Module) -> tuple:
        """A key that is equal for layers that run the same code."""
        within = [path.removeprefix(self.layer) for path in (*self.paths, *self.edges())]
        classes = [type(root.get_submodule(path)) for path in self.paths]
        return (self.structure.kind, *within, *classes)

    def edges(self) -> list[str]:
        """The modules whose inputs and outputs the proof reads."""
        parts = [part for part in (self.structure.mlp, self.structure.other) if part is not None]
        return [self.layer, self.structure.mid or self.layer, *(term.path for part in parts for term in part.terms)]

    def candidates(self, recording: Recording, tolerance: float) -> list[tuple[str, Labels]]:
        """(path, labels) of operations that hold the stream's numbers: the layer's own, then those of modules in it."""
        stream, entered = recording.given(self.structure.mid or self.layer), recording.given(self.layer)
        carried = self.carried(recording)
        if stream is None:
            return []
        if carried is not None:
            self.before = (stream.double().reshape(carried.shape), carried)
        found = []
        for path in self.paths:
            for operation in sorted(recording.operations_of(path), key=lambda o: o.ended):
                made = operation.output
                if operation.times > 1 or not isinstance(made, torch.Tensor) or made.numel() != stream.numel():
                    continue
                if not same(made, stream.reshape(made.shape), tolerance):
                    continue
                if entered is None or made.shape != entered.shape or not torch.equal(made, entered):
                    found.append((path, operation.labels))
        return found

    def is_moved(self, operation: Operation | None, recording: Recording, tolerance: float) -> bool:
        """Whether a write to an operation arrived both in the feed-forward and on the residual path.

        The feed-forward must be given the written stream. The residual path must carry it as it is, or scaled and
        shifted per channel by as much as in the run without the write.
        """
        if operation is None or operation.times > 1 or not isinstance(operation.output, torch.Tensor):
            return False
        moved = operation.output
        given, after = recording.given(self.structure.mid or self.layer), self.carried(recording)
        if given is None or after is None or given.numel() != moved.numel():
            return False
        if not same(given.reshape(moved.shape), moved, tolerance * 10):
            return False
        moved = moved.double().reshape(after.shape)
        tolerance = max(tolerance * 10, 1e-4)
        return same(after, moved, tolerance) or self.is_moved_per_channel(moved, after, tolerance)

    def is_moved_per_channel(self, moved: torch.Tensor, after: torch.Tensor, tolerance: float) -> bool:
        """Whether the residual path carries the written stream times a factor per channel, with or without a shift.

        Factor and shift are those of the run without the write.
        """
        if self.before is None:  # the run without the write did not record the residual path
            return False
        stream, carried = (t.reshape(-1, t.shape[-1]) for t in self.before)
        factor = (stream * carried).sum(0) / stream.square().sum(0).clamp(min=1e-30)
        if same(after, moved * factor, tolerance):
            return True
        apart = stream - stream.mean(0)
        factor = (apart * carried).sum(0) / apart.square().sum(0).clamp(min=1e-30)
        shift = carried.mean(0) - factor * stream.mean(0)
        return same(after, moved * factor + shift, tolerance)

    def carried(self, recording: Recording) -> torch.Tensor | None:
        """The layer's output minus what its feed-forward and further modules add, float64; None if one did not run."""
        total = recording.made(self.layer)
        if total is None:
            return None
        total = total.double()
        for part in (self.structure.mlp, self.structure.other):
            for term in part.terms if part is not None else ():
                made = recording.made(term.path)
                if made is None:
                    return None
                scale = term.scale.double() if isinstance(term.scale, torch.Tensor) else term.scale
                total = total - made.double().reshape(total.shape) * scale
        return total
