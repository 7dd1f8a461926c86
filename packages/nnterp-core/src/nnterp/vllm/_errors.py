"""Raise here, with their own type, errors that a block raised in the engine."""

from __future__ import annotations

import builtins
from typing import Any

from nnsight.intervention.interleaver import OutOfOrderError

from nnterp import errors


def raise_first(outputs: list[Any]) -> None:
    """Raise the first error among the outputs of vLLM's requests; do nothing if there is none.

    Raises:
        Exception: The error of the block, with its own type if that is Python's, nnterp's or nnsight's
            `OutOfOrderError`; else a RuntimeError whose message begins with the type. Its notes have the traceback.
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
