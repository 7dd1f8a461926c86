"""The stream between a layer's two parts: the one operation that both the feed-forward and the residual path read.

Writing the input of the feed-forward's norm would leave the residual path as it was. The sum itself is an operation of
the layer's forward, so it is found there by its numbers, and the forward is replaced by nnsight's instrumented one in
which only this operation is bracketed: a layer that has begun when the value is first asked for serves it all the same.
"""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING, Any

import torch
from nnsight.intervention import source as nnsight_source
from nnsight.intervention.source import STATE, SourceNotAvailable, State
from torch import nn

from nnterp.values._operations import Operations, record_operations, same
from nnterp.values._places import Inside, Place

if TYPE_CHECKING:
    from nnterp.certificate import ResidualStructure
    from nnterp.standardized_transformer import StandardizedTransformer


def prepare(model: StandardizedTransformer) -> None:
    """Find the stream between the parts of every layer, where the proven residual structure says that there is one.

    An operation is taken once it is proven by a write: moved, it moves what the feed-forward is given and the stream
    that the feed-forward's contribution is added to, both by as much.
    """
    from nnterp.values._probe import Probe, probing

    found: list[Place | None] = [None] * model.num_layers
    object.__setattr__(model, "_mid", found)
    model.__dict__.pop("_places", None)
    wanted, known = {}, {}  # type: ignore[var-annotated]
    for block, structure in zip(model.anatomy.blocks, model.residual_structures, strict=False):
        if structure.mid is not None and structure.mid_side == "input":
            wanted[block.index] = _Between(block.path, structure, _with_code(model._module, block.path))
    if not wanted or not model.dispatched:
        return
    with probing(model) as device:
        probe = Probe(model, device, shape=(1, 5))
        _as_in_the_first_of_its_kind(model, probe, wanted, found)
        wanted = {i: between for i, between in wanted.items() if found[i] is None}
        if not wanted:
            return
        paths = list(dict.fromkeys(path for between in wanted.values() for path in between.paths))
        only = {path for between in wanted.values() for path in between.edges()}
        operations, edges = _run(model, probe, paths, only, {})
        for between in wanted.values():
            between.find(operations, edges, probe.tolerance)
        for _ in range(MAX_TRIES):
            trying = {i: between for i, between in wanted.items() if between.options and found[i] is None}
            if not trying:
                break
            edits = {b.options[0]: _moved for b in trying.values()}
            operations, edges = _run(model, probe, paths, only, edits)
            for index, between in trying.items():
                path, labels = between.options.pop(0)
                if between.proven(path, labels, operations, edges, probe.tolerance):
                    if bracket_one(model._module.get_submodule(path), labels[0], known):
                        found[index] = Inside(path, labels)
                    between.options = []


MAX_TRIES = 6  # operations that hold the stream's numbers are few, and the first is nearly always the one


def _as_in_the_first_of_its_kind(
    model: StandardizedTransformer, probe: Any, wanted: dict[int, _Between], found: list[Place | None]
) -> None:
    """Layers of one kind have one code: search the first of each, and prove the operation in all of them at once.

    The search runs no further than the layers that are searched. What is not proven this way is left to be searched.
    """
    kinds: dict[tuple, list[int]] = {}
    for index, between in wanted.items():
        kinds.setdefault(between.kind(model._module), []).append(index)
    first = [indices[0] for indices in kinds.values()]
    if len(first) == len(wanted):
        return
    searched = [wanted[i] for i in first]
    paths = list(dict.fromkeys(path for between in searched for path in between.paths))
    only = {path for between in searched for path in between.edges()}
    operations, edges = _run(model, probe, paths, only, {}, until=wanted[max(first)].layer)
    trying: dict[int, tuple[str, tuple[str, ...]]] = {}
    for indices in kinds.values():
        one = wanted[indices[0]]
        one.find(operations, edges, probe.tolerance)
        if one.options:
            path, labels = one.options[0]
            trying |= {i: (wanted[i].layer + path.removeprefix(one.layer), labels) for i in indices}
        one.options = []
    if not trying:
        return
    paths = list(dict.fromkeys(path for path, _ in trying.values()))
    only = {path for i in trying for path in wanted[i].edges()}
    operations, edges = _run(model, probe, paths, only, dict.fromkeys(trying.values(), _moved))
    known: dict[tuple[Any, str], Any] = {}
    for index, (path, labels) in trying.items():
        proven = wanted[index].proven(path, labels, operations, edges, probe.tolerance)
        if proven and bracket_one(model._module.get_submodule(path), labels[0], known):
            found[index] = Inside(path, labels)


def _run(
    model: StandardizedTransformer,
    probe: Any,
    paths: list[str],
    only: set[str],
    edits: dict,
    until: str | None = None,
) -> tuple[Operations, Any]:
    with (edges := probe.edges(only)):
        operations = record_operations(
            model._module, paths, lambda: probe.run(until), drill=lambda function: False, edits=edits, arguments=False
        )
    return operations, edges


def _moved(output: torch.Tensor) -> torch.Tensor:
    """A stream that differs at every position, in a direction of its own."""
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

    def __init__(self, layer: str, structure: ResidualStructure, paths: list[str]) -> None:
        self.layer, self.structure, self.paths = layer, structure, paths
        self.options: list[tuple[str, tuple[str, ...]]] = []
        self.before: tuple[torch.Tensor, torch.Tensor] | None = None

    def kind(self, root: nn.Module) -> tuple:
        """What layers that run the same code have in common."""
        within = [path.removeprefix(self.layer) for path in (*self.paths, *self.edges())]
        classes = [type(root.get_submodule(path)) for path in self.paths]
        return (self.structure.kind, *within, *classes)

    def edges(self) -> list[str]:
        """The modules whose inputs and outputs the proof reads."""
        parts = [part for part in (self.structure.mlp, self.structure.other) if part is not None]
        return [self.layer, self.structure.mid or self.layer, *(term.path for part in parts for term in part.terms)]

    def find(self, operations: Operations, edges: Any, tolerance: float) -> None:
        """Operations that hold the stream's numbers: the layer's own first, then those of modules in it."""
        stream, entered = edges.input(self.structure.mid), edges.input(self.layer)
        carried = self.carried(edges)
        if carried is not None and stream is not None:
            self.before = (stream.double().reshape(carried.shape), carried)
        for path in self.paths:
            for operation in sorted(operations.of(path), key=lambda o: o.ended):
                made = operation.output
                if operation.times > 1 or not isinstance(made, torch.Tensor) or made.numel() != stream.numel():
                    continue
                if not same(made, stream.reshape(made.shape), tolerance):
                    continue
                if entered is not None and made.shape == entered.shape and torch.equal(made, entered):
                    continue
                self.options.append((path, operation.labels))

    def proven(self, path: str, labels: tuple[str, ...], operations: Operations, edges: Any, tolerance: float) -> bool:
        """Whether the operation, moved, has moved what both readers of the stream read.

        The feed-forward must be given what was moved, and the residual path must carry it: as it is, or scaled and
        shifted per channel as when nothing is moved.
        """
        operation = next((o for o in operations.of(path) if o.labels == labels), None)
        if operation is None or operation.times > 1 or not isinstance(operation.output, torch.Tensor):
            return False
        moved = operation.output
        given, after = edges.input(self.structure.mid), self.carried(edges)
        if given is None or after is None or given.numel() != moved.numel():
            return False
        if not same(given.reshape(moved.shape), moved, tolerance * 10):
            return False
        moved = moved.double().reshape(after.shape)
        tolerance = max(tolerance * 10, 1e-4)
        if same(after, moved, tolerance):
            return True
        if self.before is None:  # what carries it when nothing is moved was not seen
            return False
        stream, carried = (t.reshape(-1, t.shape[-1]) for t in self.before)
        factor = (stream * carried).sum(0) / stream.square().sum(0).clamp(min=1e-30)
        if same(after, moved * factor, tolerance):
            return True
        apart = stream - stream.mean(0)
        factor = (apart * carried).sum(0) / apart.square().sum(0).clamp(min=1e-30)
        shift = carried.mean(0) - factor * stream.mean(0)
        return same(after, moved * factor + shift, tolerance)

    def carried(self, edges: Any) -> torch.Tensor | None:
        """The layer's output without what its feed-forward, and modules after it, add."""
        total = edges.output(self.layer)
        if total is None:
            return None
        total = total.double()
        for part in (self.structure.mlp, self.structure.other):
            for term in part.terms if part is not None else ():
                made = edges.output(term.path)
                if made is None:
                    return None
                scale = term.scale.double() if isinstance(term.scale, torch.Tensor) else term.scale
                total = total - made.double().reshape(total.shape) * scale
        return total


def bracket_one(module: nn.Module, label: str, known: dict[tuple[Any, str], Any]) -> bool:
    """Serve one operation of a module's forward, and leave the others as they are; whether that worked.

    Layers of one class have one forward: what was compiled of it is kept in `known`.
    """
    state: State = module.__dict__[STATE]
    if state.sourced:
        return True

    base = nnsight_source.Instrument

    class One(base):  # type: ignore[valid-type,misc]
        def wrap(self, name: str, fn: ast.expr, args: list, keywords: list, node: ast.AST) -> Any:
            bracketed = base.wrap(self, name, fn, args, keywords, node)
            if self.names[-1] == label:
                return bracketed
            if isinstance(fn, ast.Name) and fn.id == nnsight_source.BIND:
                return args[0]
            return ast.copy_location(ast.Call(func=fn, args=args, keywords=keywords), node)

    inner, chain = nnsight_source.decorator_chain(state.original)
    key = (inner.__code__, label)  # type: ignore[attr-defined]
    if key not in known:
        nnsight_source.Instrument = One  # type: ignore[misc]
        try:
            known[key] = nnsight_source.compile_source(inner)
        except (SourceNotAvailable, OSError, SyntaxError):
            return False
        finally:
            nnsight_source.Instrument = base  # type: ignore[misc]
    compiled = known[key]
    cells = dict(zip(inner.__code__.co_freevars, inner.__closure__ or (), strict=False))  # type: ignore[attr-defined]
    closure = tuple(cells[name] for name in compiled.code.co_freevars) or None
    op = nnsight_source.make_op(lambda: state.active()[:2])
    names = {nnsight_source.OP: op, nnsight_source.BIND: nnsight_source.bind}
    state.body = nnsight_source.rewrap(chain, nnsight_source.function_like(inner, compiled.code, closure, **names))
    return True
