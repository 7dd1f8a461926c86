"""The code that a model runs: its classes, and the functions of the files in which they are written."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import lru_cache
from types import CodeType, FunctionType
from typing import Any

from torch import nn

from nnterp.identity._code import SIMPLE
from nnterp.identity._digests import digest, name_of

_digest_of_code = lru_cache(65536)(digest)


def code_digest(root: nn.Module) -> str:
    """Return a digest of the code that a model's modules run, 16 hexadecimal digits.

    It holds the methods of every class among the modules, and every function and class in the Python files that these
    classes come from, as they are in memory: a method or function that was replaced there changes the digest. Of
    functions of torch and of transformers that such a file imports, their own code counts.
    """
    classes = {own for module in root.modules() for own in type(module).__mro__ if _is_models(own)}
    classes |= {type(module) for module in root.modules()}
    files = {own.__module__ for own in classes if not own.__module__.startswith("torch.")}
    found = [(name_of(own), _methods(own)) for own in classes]
    for file in files:
        for name, value in list(vars(sys.modules[file]).items()) if file in sys.modules else ():
            if isinstance(value, FunctionType):
                found.append((f"{file}.{name}", list(_codes(value, set()))))
            elif isinstance(value, type) and value.__module__ == file:
                found.append((f"{file}.{name}", _methods(value)))
    return digest(sorted(map(repr, found)))


def function_digest(function: Any) -> str:
    """Return a digest of the code of one function, and of the functions that it wraps."""
    return digest([name_of(function), *_codes(function, set())])


def _is_models(own: type) -> bool:
    """Whether a class belongs to a model's code, and not to torch or to the general code of transformers."""
    general = own.__module__.startswith(("torch.", "transformers.")) or own is object
    return not general or own.__module__.startswith("transformers.models.")


def _methods(own: type) -> list[Any]:
    methods = []
    for name, value in sorted(vars(own).items()):
        if isinstance(value, property):
            value = value.fget
        value = getattr(value, "__func__", value)
        if isinstance(value, FunctionType):
            methods.append((name, list(_codes(value, set()))))
        elif isinstance(value, SIMPLE) and not name.startswith("__"):
            methods.append((name, [repr(value)]))
    return methods


def _codes(function: Any, seen: set[int]) -> Iterator[str]:
    """The digests of a function's code and defaults, and of the functions in its closure: what a decorator wraps."""
    if not isinstance(function, FunctionType) or id(function) in seen:
        return
    seen.add(id(function))
    code: CodeType = function.__code__
    yield _digest_of_code(code)
    defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
    yield repr([value for value in defaults if isinstance(value, SIMPLE)])
    for cell in function.__closure__ or ():
        try:
            yield from _codes(cell.cell_contents, seen)
        except ValueError:  # the variable has no value yet
            continue
