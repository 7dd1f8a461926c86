"""Serve one operation of a module's forward without instrumenting the others.

nnsight instruments a forward when its `source` is first read, which is too late for a layer that has already begun. The
operation that makes `layers_mid` is therefore instrumented before the run, and alone, so that a run without reads costs
nothing more.
"""

from __future__ import annotations

import ast
from typing import Any

from nnsight.intervention import source as nnsight_source
from nnsight.intervention.source import STATE, SourceNotAvailable, State
from torch import nn

BRACKETED = "__nnterp_bracketed__"  # of a forward in which one operation is instrumented alone: its label


# Layers of one class share one compiled forward: pass the same `known` for all layers.
def bracket_one(module: nn.Module, label: str, known: dict[tuple[Any, str], Any]) -> bool:
    """Instrument one operation of a module's forward; whether it worked. It needs the forward's Python source."""
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

    whole = (state.original, "decorators")
    if whole not in known:
        known[whole] = nnsight_source.decorator_chain(state.original)
    inner, chain = known[whole]
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
    setattr(state.body, BRACKETED, label)
    return True
