"""`nnterp.utils` of 1.x. New code needs none of it."""

from __future__ import annotations

import sys
from typing import Any

import nnsight
import torch
import transformers

__all__ = [
    "NNSIGHT_VERSION",
    "TRANSFORMERS_VERSION",
    "ArchitectureNotFound",
    "DummyCache",
    "TraceTensor",
    "display_markdown",
    "display_source",
    "dummy_inputs",
    "is_notebook",
    "try_with_scan",
    "unpack_tuple",
]

TraceTensor = torch.Tensor
NNSIGHT_VERSION: str = nnsight.__version__
TRANSFORMERS_VERSION: str = transformers.__version__


class ArchitectureNotFound:
    """Stands for a class that transformers does not have."""


class DummyCache:
    """Stands for a cache that nothing reads."""

    def to_legacy_cache(self) -> None:
        """None."""


def is_notebook() -> bool:
    """Find out whether this is a notebook's kernel; returns True if it is."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return "IPKernelApp" in getattr(shell, "config", ())


def display_markdown(text: str) -> None:
    """Show Markdown in a notebook; print it where no IPython is running."""
    try:
        from IPython import get_ipython
        from IPython.display import Markdown, display
    except ImportError:
        print(text)
        return
    if get_ipython() is None:  # it is installed, and this is a plain program
        print(text)
    else:
        display(Markdown(text))


def display_source(source: Any) -> None:
    """Show Python source (a text, or nnsight's `.source` of a module) as code in a notebook."""
    display_markdown(f"```py\n{source}\n```")


def dummy_inputs() -> dict[str, torch.Tensor]:
    """Make an input for a forward pass whose numbers do not matter.

    Returns:
        A dict with `input_ids`, int64 `[1, 3]`, on the CPU.
    """
    return {"input_ids": torch.tensor([[0, 1, 1]])}


def unpack_tuple(tensor_or_tuple: Any) -> Any:
    """Unpack a tuple; returns its first entry, and anything else as it is."""
    return tensor_or_tuple[0] if isinstance(tensor_or_tuple, tuple) else tensor_or_tuple


def try_with_scan(
    model: Any,
    function: Any,
    error_to_throw: Exception,
    allow_dispatch: bool = True,
    warn_if_scan_fails: bool = True,
    errors_to_raise: tuple[type[Exception], ...] | type[Exception] | None = None,
) -> bool:
    """Call `function` in a forward pass on fake tensors; if that fails, in one that loads the weights.

    Args:
        model: An nnsight model.
        function: Called without arguments, inside the pass.
        error_to_throw: Raised if both passes fail.
        allow_dispatch: Whether the second pass may load weights that are not there.
        warn_if_scan_fails: Accepted for compatibility.
        errors_to_raise: Errors of `function` that are raised at once.

    Returns:
        True if fake tensors did.
    """
    given = (errors_to_raise,) if isinstance(errors_to_raise, type) else errors_to_raise or ()
    try:
        with model.scan(dummy_inputs(), use_cache=False):
            function()
        return True
    except Exception as error:
        if isinstance(error, given):
            raise
        if not allow_dispatch and not model.dispatched:
            raise error_to_throw from error
    try:
        with model.trace(dummy_inputs()):
            function()
    except Exception as error:
        if isinstance(error, given):
            raise
        raise error_to_throw from error
    return False
