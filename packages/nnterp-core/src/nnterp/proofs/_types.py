"""Whether a value that was read has the type that its field states."""

from __future__ import annotations

import functools
import typing
from collections.abc import Callable, Mapping
from types import NoneType, UnionType
from typing import Any, Literal, Union

Check = Callable[[Any], bool]


def fits(value: Any, hint: Any) -> bool:
    """Return True if a value is of a stated type, also inside containers; types that cannot be asked fit anything."""
    return check_of(hint)(value)


@functools.lru_cache(4096)
def check_of(hint: Any) -> Check:
    """Return a function that says whether a value fits a type: a proof holds many values of few types."""
    if hint is Any or hint is object:
        return lambda value: True
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, UnionType):
        return _any_of([check_of(one) for one in arguments])
    if origin is Literal:
        return lambda value: value in arguments
    if origin is tuple:
        return _tuple_of(arguments)
    if origin in (list, set, frozenset):
        return _all_of(origin, check_of(arguments[0]))
    if origin in (dict, Mapping):
        return _mapping_of(*map(check_of, arguments))
    if origin is not None or not isinstance(hint, type):
        return lambda value: True
    if hint is NoneType:
        return lambda value: value is None
    if getattr(hint, "_is_protocol", False):
        return lambda value: not isinstance(value, (str, int, float, tuple, list, dict, NoneType))
    if hint is float:
        return lambda value: type(value) in (float, int)
    if hint in (int, bool, str):
        return lambda value: type(value) is hint
    return lambda value: isinstance(value, hint)


def _any_of(checks: list[Check]) -> Check:
    def fitting(value: Any) -> bool:
        return any(check(value) for check in checks)

    return fitting


def _all_of(kind: Any, check: Check) -> Check:
    def fitting(value: Any) -> bool:
        return isinstance(value, kind) and all(check(item) for item in value)

    return fitting


def _tuple_of(arguments: tuple[Any, ...]) -> Check:
    if len(arguments) == 2 and arguments[1] is ...:
        return _all_of(tuple, check_of(arguments[0]))
    checks = list(map(check_of, arguments))

    def fitting(value: Any) -> bool:
        if not isinstance(value, tuple) or len(value) != len(checks):
            return False
        return all(check(item) for check, item in zip(checks, value, strict=True))

    return fitting


def _mapping_of(key: Check, item: Check) -> Check:
    def fitting(value: Any) -> bool:
        return isinstance(value, Mapping) and all(key(k) and item(v) for k, v in value.items())

    return fitting
