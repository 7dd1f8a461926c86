"""Errors that were raised in the engine, with the types they were raised with."""

from __future__ import annotations

import builtins
from typing import Any

from nnsight.intervention.interleaver import OutOfOrderError

from nnterp import errors


def raise_first(outputs: list[Any]) -> None:
    """Raise the first error that a block raised for one of the requests, if there is one.

    Raises:
        Exception: Of the type that the block raised, if it is Python's, nnterp's or nnsight's `OutOfOrderError`; else a
            RuntimeError whose text begins with its type. The lines of the block stand in its notes.
    """
    for output in outputs:
        error = getattr(output, "nnsight_error", None)
        if error and not error.get("is_control_flow"):
            raised = _made(error["type_name"], error["message"])
            raised.add_note(f"In the engine:\n{error.get('traceback', '')}")
            raise raised


def _made(name: str, message: str) -> Exception:
    kind = OutOfOrderError if name == "OutOfOrderError" else getattr(errors, name, getattr(builtins, name, None))
    if isinstance(kind, type) and issubclass(kind, Exception):
        try:
            return kind(message)
        except TypeError:
            pass
    return RuntimeError(f"{name}: {message}")
