"""`RequestTracer`: nnsight's tracer of a remote block, which tells the model what the block mentions."""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Iterator, Mapping
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from nnsight.intervention.tracer import InterleavingTracer
from torch import nn

from nnterp.editing import EDITS, mentions_edits, mentions_values
from nnterp.table import LABELS, SENT_WHERE_NAMED, VALUES
from nnterp.traced import StepTracer
from nnterp.traced_block._followed import LastInWith, refuse_followed
from nnterp.traced_block._lost_edits import refuse_lost_edits

# They know nothing of nnterp. From a program that runs (a session of pytest or IPython) all that is loaded is reached.
OTHERS = "torch transformers nnsight numpy scipy sklearn pandas plotly matplotlib IPython pytest _pytest pluggy"
NOT_READ = {*sys.stdlib_module_names, *OTHERS.split()}


class RequestTracer(LastInWith, StepTracer):
    """Sends along the model's edits, and values of few models, that the block or a function that it names mentions."""

    def __reduce_ex__(self, protocol: Any) -> tuple:
        model: Any = self.envoy
        scope = {**self.info.frame.f_globals, **self.info.frame.f_locals}  # type: ignore[union-attr]
        refuse_followed(self.node, self, scope)
        refuse_lost_edits(model, self.node, scope)
        try:
            names, texts = mentioned(self.node, scope)
            edits, values = bool(model.standing) or not EDITS.isdisjoint(names), SENT_WHERE_NAMED & (names | texts)
        except Exception:  # an object that cannot be looked into: then all are sent
            edits, values = True, SENT_WHERE_NAMED
        mentions_edits.set(edits)
        mentions_values.set(values)
        sent = StepTracer if edits else InterleavingTracer
        return object.__new__, (sent,), self.__getstate__()  # type: ignore[attr-defined]


def mentioned(node: ast.AST, scope: Mapping[str, Any]) -> tuple[set[str], set[str]]:
    """Every name and attribute, and every text, in a block, in the functions and classes that it names, and in theirs.

    Args:
        node: The `with` statement.
        scope: The variables that it sees.
    """
    names = {
        n.id if isinstance(n, ast.Name) else n.attr for n in ast.walk(node) if isinstance(n, ast.Name | ast.Attribute)
    }
    texts = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    seen = {id(VALUES), id(LABELS), id(SENT_WHERE_NAMED)}  # they name all values, whatever the block does
    waiting = [scope[name] for name in names if name in scope]
    while waiting:
        found = waiting.pop()
        if id(found) in seen:
            continue
        seen.add(id(found))
        if isinstance(found, str):
            texts.add(found)
        waiting += _held(found)
        for function in _functions(found):
            code = [*_codes(function.__code__)]
            own = {name for one in code for name in (*one.co_names, *one.co_freevars)}
            names |= own
            texts |= {const for one in code for const in one.co_consts if isinstance(const, str)}
            waiting += [function.__globals__[name] for name in own if name in function.__globals__]
            waiting += [cell.cell_contents for cell in function.__closure__ or () if _filled(cell)]
            waiting += [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    return names, texts


def _held(found: Any) -> list[Any]:
    """What a container, a bound method, a partial or an object of the user's holds."""
    if isinstance(found, dict):
        return [*dict.values(found)]
    if isinstance(found, list | tuple | set | frozenset):
        return [*found]
    if isinstance(found, functools.partial):
        return [found.func, *found.args, *found.keywords.values()]
    if isinstance(found, MethodType):
        return [found.__func__, found.__self__]
    return [*vars(found).values()] if hasattr(found, "__dict__") and _is_read(type(found)) else []


def _functions(found: Any) -> Iterator[FunctionType]:
    """The functions of nnterp or of the user that are called when this object is used."""
    if isinstance(found, FunctionType):
        if _is_read(found):
            yield found
    elif isinstance(found, ModuleType):
        if found.__name__.partition(".")[0] not in NOT_READ:
            yield from (f for f in vars(found).values() if isinstance(f, FunctionType) and _is_read(f))
    elif not isinstance(found, nn.Module) and _is_read(kind := found if isinstance(found, type) else type(found)):
        for value in [value for base in kind.__mro__ if _is_read(base) for value in vars(base).values()]:
            for function in (value.fget, value.fset) if isinstance(value, property) else (value,):
                plain = getattr(function, "__func__", function)  # of a static or class method
                if isinstance(plain, FunctionType):
                    yield plain


def _is_read(found: Any) -> bool:
    # The model's own classes have the edits as methods; that says nothing of the block.
    home = getattr(found, "__module__", None) or ""
    return home.partition(".")[0] not in NOT_READ and not (
        isinstance(found, type) and hasattr(found, "_remoteable_class")
    )


def _codes(code: CodeType) -> Iterator[CodeType]:
    """A function's code, and that of the functions in it."""
    yield code
    for const in code.co_consts:
        if isinstance(const, CodeType):
            yield from _codes(const)


def _filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
