"""What a function depends on: its code, its defaults, its closure and the functions it uses."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import FunctionType, MethodType
from typing import Any

from torch import nn

from nnterp.identity._code import closure_of, neighbours, plain_globals
from nnterp.identity._digests import digest, module_in, summary
from nnterp.identity._weights import checksum

ATTRIBUTE = "attribute "  # begins the name of an object's attribute


def parts_of_function(function: Callable[..., Any]) -> dict[str, Any]:
    """Return a `summary` of everything that decides what a callable returns, under names for messages.

    These are the code, the default values, the variables of the closure, the arguments that a `functools.partial` sets,
    the global variables that hold data, the functions and classes of the same module that it uses, and the attributes
    of a callable object.
    """
    found: dict[str, Any] = {}
    while isinstance(function, partial):
        found |= {f"argument {i}": summary(value) for i, value in enumerate(function.args)}
        found |= {f"argument {name!r}": summary(value) for name, value in function.keywords.items()}
        function = function.func
    if isinstance(function, MethodType):
        found |= _attributes(function.__self__)
        function = function.__func__
    if not isinstance(function, FunctionType):
        found |= {"class": digest(type(function)), **_attributes(function)}
        if isinstance(function, nn.Module):
            found["weights"] = checksum(function)
        function = getattr(type(function), "forward" if isinstance(function, nn.Module) else "__call__")
    if isinstance(function, FunctionType):
        _add_parts(found, function, "", set())
    return found


def _add_parts(found: dict[str, Any], function: FunctionType, of: str, seen: set[int]) -> None:
    """Add the parts of a function and of the functions that it uses.

    Each value has an entry of its own, so that a counter among them does not hide the others.

    Args:
        found: The parts so far.
        function: The function.
        of: Ends the names of its parts, such as " of 'helper'".
        seen: The `id`s of functions that are added already.
    """
    seen.add(id(function))
    found[f"code{of}"] = digest(function.__code__)
    variables = {f"default {i}": value for i, value in enumerate(function.__defaults__ or ())}
    variables |= {f"default of {name!r}": value for name, value in (function.__kwdefaults__ or {}).items()}
    variables |= {f"variable {name!r}": value for name, value in closure_of(function)}
    variables |= {f"global variable {name!r}": value for name, value in plain_globals(function)}
    variables |= {f"{name!r}": value for name, value in neighbours(function)}
    for name, value in variables.items():
        if not isinstance(value, FunctionType):
            found[f"{name}{of}"] = summary(value)
        elif id(value) not in seen:
            _add_parts(found, value, f" of {name}{of}", seen)


def _attributes(value: Any) -> dict[str, Any]:
    if module_in(value) is not None:
        return {}
    return {f"{ATTRIBUTE}{name!r}": summary(own) for name, own in sorted(getattr(value, "__dict__", {}).items())}
