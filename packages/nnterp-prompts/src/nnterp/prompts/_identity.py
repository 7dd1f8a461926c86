"""What a run of `run_prompts` depends on: its settings, the function and its arguments, the model and its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from nnterp import StandardizedTransformer
from nnterp.identity import CHANGES, parts_of_function, same, settings_of_model, summary


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
    function = get_probs
    while isinstance(function, partial):
        function = function.func
    return {
        "scoring": scoring,
        "normalize_length": normalize_length,
        "get_probs_func": None if function is None else getattr(function, "__qualname__", type(function).__qualname__),
        "function": {} if get_probs is None else parts_of_function(get_probs),
        "func_kwargs": {key: summary(value) for key, value in (kwargs or {}).items()},
        **settings_of_model(model),
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
            if not same(values.get(name), before):
                settings[key][name] = CHANGES
