"""What a run depends on: its settings, the function and its arguments, the model and its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import FunctionType, MethodType
from typing import Any

from torch import nn

from nnterp import StandardizedTransformer
from nnterp.prompts._code import closure_of, names_read, neighbours, plain_globals, plain_values
from nnterp.prompts._digests import digest, module_in, summary
from nnterp.prompts._weights import checksum

CHANGES = "changes during the run"  # stands for a value that the run itself changes, such as a counter
_ATTRIBUTE = "attribute "  # begins the name of an object's attribute
_FORGOTTEN = frozenset({"transformers_version", "dtype", "torch_dtype", "use_cache", "architectures"})


def settings_of(
    model: StandardizedTransformer,
    scoring: str,
    normalize_length: bool,
    get_probs: Callable[..., Any] | None,
    kwargs: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Return everything that distinguishes a run from other runs of the same prompts, as JSON can hold it.

    Args:
        model: The model. Its weights are loaded, unless it runs remotely.
        scoring: The scoring.
        normalize_length: Whether scores are means over tokens.
        get_probs: The function, or None.
        kwargs: The function's further arguments.
    """
    module = model._module
    function = get_probs
    while isinstance(function, partial):
        function = function.func
    return {
        "scoring": scoring,
        "normalize_length": normalize_length,
        "get_probs_func": None if function is None else getattr(function, "__qualname__", type(function).__qualname__),
        "function": {} if get_probs is None else parts_of_function(get_probs),
        "func_kwargs": {key: summary(value) for key, value in (kwargs or {}).items()},
        "model_class": model.anatomy.model_class,
        "model": model.repo_id or "",
        "revision": getattr(module.config, "_commit_hash", None) or getattr(model, "revision", None),
        "dtype": str(getattr(module, "dtype", None)),
        "config": digest(_config(module.config)),
        "edits": [_edit(edit) for edit in getattr(model, "_edits", ())],
        **({"steering": [digest(vars(steering)) for steering in model.standing]} if model.standing else {}),
        "weights": checksum(module),
    }


def mark_changes(
    settings: dict[str, Any], get_probs: Callable[..., Any] | None, kwargs: Mapping[str, Any] | None
) -> None:
    """Mark what the run has changed by itself since `settings_of`, so that it is not compared when resuming.

    A counter in a function's closure is no argument of the run.
    """
    now = {
        "function": {} if get_probs is None else parts_of_function(get_probs),
        "func_kwargs": {key: summary(value) for key, value in (kwargs or {}).items()},
    }
    for key, values in now.items():
        for name, before in settings[key].items():
            if not _same(values.get(name), before):
                settings[key][name] = CHANGES


def parts_of_function(function: Callable[..., Any]) -> dict[str, Any]:
    """Return a `summary` of everything that decides what a callable returns, under names for messages.

    These are the code, the default values, the variables of the closure, the arguments that a `functools.partial` sets,
    the plain values of global variables, the functions and classes of the same module that it uses, and the attributes
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


def differences(earlier: Mapping[str, Any], current: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Compare the settings of two runs.

    What the earlier run marked as changed by itself is not compared, and marked in `current` as well.

    Returns:
        Two lists of texts that name what differs. The first is of differences that make it another run. The second is
        of attributes of a callable object, which may be counters or caches.
    """
    serious: list[str] = []
    attributes: list[str] = []
    for key, now in current.items():
        then = earlier.get(key)
        if not isinstance(now, dict) or not isinstance(then, Mapping):
            if not _same(then, now):
                serious.append(f"{key}={then!r}, and this run has {now!r}")
            continue
        for name in {**then, **now}:
            if CHANGES in (then.get(name), now.get(name)):
                now[name] = CHANGES
            elif not _same(then.get(name), now.get(name)):
                place = f"{key}[{name!r}]" if key == "func_kwargs" else f"{name} of get_probs_func"
                text = f"{place} = {then.get(name)!r}, and this run has {now.get(name)!r}"
                (attributes if name.startswith(_ATTRIBUTE) and key == "function" else serious).append(text)
    return serious, attributes


def _same(one: Any, other: Any) -> bool:
    """Return True for equal values of one type: 1 is neither 1.0 nor True."""
    return type(one) is type(other) and one == other


def _attributes(value: Any) -> dict[str, Any]:
    if module_in(value) is not None:
        return {}
    return {f"{_ATTRIBUTE}{name!r}": summary(own) for name, own in sorted(getattr(value, "__dict__", {}).items())}


def _config(config: Any) -> dict[str, Any]:
    """Return the parts of a model's config that its numbers may depend on."""

    def kept(values: Mapping[str, Any]) -> dict[str, Any]:
        return {
            key: kept(value) if isinstance(value, dict) else value
            for key, value in values.items()
            if not str(key).startswith("_") and key not in _FORGOTTEN
        }

    return kept(config.to_dict()) if hasattr(config, "to_dict") else {}


def _edit(edit: Any) -> str:
    """Return a digest of an edit made by nnsight's `model.edit()`: its code and the plain values it reads."""
    names = names_read(edit.code)
    variables = [*plain_values(names, edit.glbls), *plain_values(names, edit.lcls)]
    return digest((edit.code, variables))
