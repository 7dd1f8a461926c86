"""Digests of values and functions: the same in every process for equal values, another for different ones."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from enum import Enum
from pathlib import PurePath
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn

from nnterp.identity._code import SIMPLE, closure_of, is_array, neighbours, plain_globals
from nnterp.identity._weights import checksum, checksum_of_tensors

_SHOWN = 60  # characters of a container in a summary
_TEXT = 200  # characters of a text that is shown as it is


def summary(value: Any) -> Any:
    """Return what is saved of a value and compared: a simple value as it is, of others the type and a digest."""
    if isinstance(value, str) and len(value) <= _TEXT:
        return value
    if value is None or isinstance(value, (bool, int)) or (isinstance(value, float) and abs(value) < float("inf")):
        return value
    text = repr(value) if isinstance(value, (list, tuple)) and all(isinstance(item, SIMPLE) for item in value) else ""
    shown = text if 0 < len(text) <= _SHOWN else type(value).__name__
    return f"{shown} #{digest(value)}"


def digest(value: Any) -> str:
    """Return a digest of any value, 16 hexadecimal digits.

    Tensors and arrays count with all their numbers, modules with their weights, functions with their code, defaults and
    closure, other objects with what pickle stores of them. An object that cannot be pickled counts by its class.
    """
    try:
        form = _form(value, ())
    except RecursionError:
        form = ("object", name_of(type(value)))
    return hashlib.sha256(repr(form).encode()).hexdigest()[:16]


def name_of(definition: Any) -> str:
    """Return the module and the qualified name of a function or a class."""
    return (
        f"{getattr(definition, '__module__', '')}.{getattr(definition, '__qualname__', type(definition).__qualname__)}"
    )


def module_in(value: Any) -> nn.Module | None:
    """Return a torch module, also if nnsight wraps it; None for anything else."""
    inner = value if isinstance(value, nn.Module) else getattr(value, "_module", None)
    return inner if isinstance(inner, nn.Module) else None


def _form(value: Any, inside: tuple[int, ...]) -> Any:
    """Return a value as nested tuples of texts, whose `repr` is the same in every process.

    Args:
        value: The value.
        inside: The `id`s of the values that this one is a part of.
    """
    if isinstance(value, SIMPLE) and not isinstance(value, Enum):
        return type(value).__name__, repr(value)
    if id(value) in inside:
        return "inside itself", len(inside) - inside.index(id(value))
    inside = (*inside, id(value))
    if isinstance(value, torch.Tensor):
        return "tensor", checksum_of_tensors([("", value)])
    if is_array(value):
        return "array", value.dtype.str, list(value.shape), hashlib.sha256(value.tobytes()).hexdigest()
    if isinstance(value, (Enum, PurePath)):
        return name_of(type(value)), str(value)
    if isinstance(value, (CodeType, FunctionType, BuiltinFunctionType, MethodType, ModuleType, type)):
        return _form_of_definition(value, inside)
    if (module := module_in(value)) is not None:
        return "module", name_of(type(value)), checksum(module)
    if type(value) in (list, tuple):
        return type(value).__name__, [_form(item, inside) for item in value]
    if isinstance(value, (set, frozenset)):
        return type(value).__name__, sorted(repr(_form(item, inside)) for item in value)
    if type(value) is dict:
        return "dict", sorted(repr((_form(key, inside), _form(item, inside))) for key, item in value.items())
    return _form_of_object(value, inside)


def _form_of_definition(value: Any, inside: tuple[int, ...]) -> Any:
    """Return the form of code, a function, a method, a class or an imported module."""
    if isinstance(value, ModuleType):
        return "imported", value.__name__
    if isinstance(value, MethodType):
        return "method", _form(value.__func__, inside), _form(value.__self__, inside)
    if isinstance(value, CodeType):
        constants = [_form(constant, inside) for constant in value.co_consts]
        return "code", value.co_code.hex(), value.co_names, value.co_varnames, value.co_freevars, constants
    if isinstance(value, type):
        methods = [(name, getattr(own, "__func__", own)) for name, own in sorted(vars(value).items())]
        codes = [(name, _form(own.__code__, inside)) for name, own in methods if isinstance(own, FunctionType)]
        bases = [_form(base, inside) for base in value.__bases__ if base.__module__ == value.__module__]
        return "class", name_of(value), codes, bases
    if not isinstance(value, FunctionType):
        return "builtin", name_of(value)
    defaults = _form(value.__defaults__, inside), _form(value.__kwdefaults__, inside)
    variables = [(name, _form(own, inside)) for name, own in (*closure_of(value), *plain_globals(value))]
    used = [(name, _form(getattr(own, "__code__", None), inside)) for name, own in neighbours(value)]
    return "function", name_of(value), _form(value.__code__, inside), defaults, variables, used


def _form_of_object(value: Any, inside: tuple[int, ...]) -> Any:
    """Return the form of what pickle stores of an object, or of its class if it cannot be pickled."""
    if isinstance(value, BaseException):  # its notes and its traceback change when it is raised
        return "exception", name_of(type(value)), _form(value.args, inside)
    try:
        reduced = value.__reduce_ex__(4)
    except Exception:
        return "object", name_of(type(value))
    if isinstance(reduced, str):
        return "object", name_of(type(value)), reduced
    pieces = [list(piece) if isinstance(piece, Iterator) else piece for piece in reduced]
    return "object", name_of(type(value)), [_form(piece, inside) for piece in pieces]
