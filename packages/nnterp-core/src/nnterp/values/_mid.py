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

from nnterp.values._operations import record_operations, same
from nnterp.values._places import Inside, Place

if TYPE_CHECKING:
    from nnterp.standardized_transformer import StandardizedTransformer


def prepare(model: StandardizedTransformer) -> None:
    """Find the stream between the parts of every layer, where the proven residual structure says that there is one."""
    from nnterp.values._probe import Probe, probing

    found: list[Place | None] = [None] * model.num_layers
    object.__setattr__(model, "_mid", found)
    model.__dict__.pop("_places", None)
    wanted = [
        (b, s) for b, s in zip(model.anatomy.blocks, model.residual_structures, strict=False) if s.mid is not None
    ]
    if not wanted or not model.dispatched:
        return
    with probing(model) as device:
        probe = Probe(model, device)
        with (edges := probe.edges()):
            operations = record_operations(
                model._module, [block.path for block, _ in wanted], probe.run, drill=lambda function: False
            )
    for block, structure in wanted:
        assert structure.mid is not None
        stream = edges.output(structure.mid) if structure.kind == "post-norm" else edges.input(structure.mid)
        entered = edges.input(block.path)
        for operation in sorted(operations.of(block.path), key=lambda o: o.ended):
            made = operation.output
            if operation.times > 1 or not same(made, stream, probe.tolerance):
                continue
            if entered is not None and made.shape == entered.shape and torch.equal(made, entered):
                continue
            if bracket_one(model._module.get_submodule(block.path), operation.labels[0]):
                found[block.index] = Inside(block.path, operation.labels)
            break


def bracket_one(module: nn.Module, label: str) -> bool:
    """Serve one operation of a module's forward, and leave the others as they are; whether that worked."""
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
    nnsight_source.Instrument = One  # type: ignore[misc]
    try:
        compiled = nnsight_source.compile_source(inner)
    except (SourceNotAvailable, OSError, SyntaxError):
        return False
    finally:
        nnsight_source.Instrument = base  # type: ignore[misc]
    cells = dict(zip(inner.__code__.co_freevars, inner.__closure__ or (), strict=False))  # type: ignore[attr-defined]
    closure = tuple(cells[name] for name in compiled.code.co_freevars) or None
    op = nnsight_source.make_op(lambda: state.active()[:2])
    names = {nnsight_source.OP: op, nnsight_source.BIND: nnsight_source.bind}
    state.body = nnsight_source.rewrap(chain, nnsight_source.function_like(inner, compiled.code, closure, **names))
    return True
