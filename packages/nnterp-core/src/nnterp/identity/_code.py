"""What a function's code refers to: its closure, the global variables it reads, and its neighbours in the module."""

from __future__ import annotations

import dataclasses
import dis
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from types import CodeType, EllipsisType, FunctionType, NoneType
from typing import Any

import torch
from torch import nn

SIMPLE = (bool, int, float, complex, str, bytes, NoneType, EllipsisType, range, torch.dtype, torch.device)
_DEPTH = 16  # containers and records in one another, at most


@lru_cache(4096)
def names_read(code: CodeType) -> tuple[str, ...]:
    """Return the global names that code reads, also in the functions defined inside it; sorted."""
    names = {i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= set(names_read(constant))
    return tuple(sorted(names))


def closure_of(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """Yield the variables of enclosing functions that a function uses, and their values."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            value = cell.cell_contents
        except ValueError:  # the variable has no value yet
            continue
        yield name, value


def plain_values(names: Iterable[str], scope: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return the variables with plain values: numbers, texts, tensors, arrays, and what holds these."""
    return [(name, scope[name]) for name in names if name in scope and is_plain(scope[name])]


def plain_globals(function: FunctionType) -> list[tuple[str, Any]]:
    """Return the global variables with plain values that a function reads."""
    return plain_values(names_read(function.__code__), function.__globals__)


def neighbours(function: FunctionType) -> list[tuple[str, FunctionType | type]]:
    """Return the functions and classes of the same module whose names a function reads."""
    found = [(name, function.__globals__.get(name)) for name in names_read(function.__code__)]
    return [
        (name, value)
        for name, value in found
        if isinstance(value, (FunctionType, type)) and value.__module__ == function.__module__
    ]


def is_plain(value: Any) -> bool:
    """Return True for numbers, texts, tensors, arrays, and containers and records of these.

    A record is an object of a dataclass, whose fields may also be functions, or an object that pickle takes apart into
    its attributes and that is not callable. Records that hold themselves, or others in many levels, are not plain.
    """
    return _is_plain(value, (), set())


def _is_plain(value: Any, inside: tuple[int, ...], seen: set[int]) -> bool:
    """`inside`: the `id`s of the containers and records that this value is a part of; `seen`: of those found plain."""
    if isinstance(value, (*SIMPLE, torch.Tensor)) or is_array(value) or id(value) in seen:
        return True
    if len(inside) > _DEPTH or id(value) in inside:
        return False
    if isinstance(value, (list, tuple, set, frozenset)):
        parts = list(value)
    elif isinstance(value, dict):
        parts = [*value, *value.values()]
    elif isinstance(value, (type, nn.Module, FunctionType)):
        return False
    elif dataclasses.is_dataclass(value):
        parts = [getattr(value, field.name, None) for field in dataclasses.fields(value)]
        parts = [part for part in parts if not isinstance(part, FunctionType)]
    elif _is_record(value):
        parts = list(vars(value).values())
    else:
        return False
    if not all(_is_plain(part, (*inside, id(value)), seen) for part in parts):
        return False
    seen.add(id(value))
    return True


def _is_record(value: Any) -> bool:
    hooks = ("__reduce__", "__reduce_ex__", "__getstate__")
    usual = all(getattr(type(value), name, None) is getattr(object, name, None) for name in hooks)
    return usual and hasattr(value, "__dict__") and not callable(value)


def is_array(value: Any) -> bool:
    """Return True for arrays and numbers of NumPy, unless they hold objects."""
    return (
        type(value).__module__ == "numpy" and hasattr(value, "tobytes") and not getattr(value.dtype, "hasobject", True)
    )
