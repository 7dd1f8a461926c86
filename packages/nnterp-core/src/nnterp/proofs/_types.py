"""Whether a value that was read has the type that its field states."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, Literal, Union


def fits(value: Any, hint: Any) -> bool:
    """Return True if a value is of a stated type, also inside containers; types that cannot be asked fit anything."""
    if hint is Any or hint is object:
        return True
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, UnionType):
        return any(fits(value, one) for one in arguments)
    if origin is Literal:
        return value in arguments
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if len(arguments) == 2 and arguments[1] is ...:
            return all(fits(item, arguments[0]) for item in value)
        return len(value) == len(arguments) and all(map(fits, value, arguments))
    if origin in (list, set, frozenset):
        return isinstance(value, origin) and all(fits(item, arguments[0]) for item in value)
    if origin in (dict, Mapping):
        key, item = arguments
        return isinstance(value, Mapping) and all(fits(k, key) and fits(v, item) for k, v in value.items())
    if origin is not None or not isinstance(hint, type):
        return True
    if hint is NoneType or hint is None:
        return value is None
    if getattr(hint, "_is_protocol", False):
        return not isinstance(value, (str, int, float, tuple, list, dict, NoneType))
    if hint is float:
        return type(value) in (float, int)
    return type(value) is hint if hint in (int, bool, str) else isinstance(value, hint)
