"""Parse a decorator's source once: nnsight does it anew for every module whose forward it instruments.

In transformers nearly every forward is decorated, so that took a tenth of the time in which a model is proven.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from types import CodeType, FunctionType

from nnsight.intervention import source as nnsight_source
from nnsight.intervention.source import SourceNotAvailable

_CALLED: dict[tuple[str, CodeType], frozenset[str] | None] = {}


def names_called(code: CodeType) -> frozenset[str] | None:
    """The plain names that a function's source calls; None if it has no source. Remembered for each code object."""
    key = (code.co_filename, code)  # equal code in two files is two functions
    if key not in _CALLED:
        try:
            tree, _, _ = nnsight_source.source_tree(code)
        except SourceNotAvailable:
            _CALLED[key] = None
        else:
            calls = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
            _CALLED[key] = frozenset(function.id for function in calls if isinstance(function, ast.Name))
    return _CALLED[key]


def peel_index(wrapper: Callable) -> int | None:
    """What nnsight's `peel_index` returns: the closure cell with the one function that a decorator's wrapper calls."""
    code = getattr(wrapper, "__code__", None)
    if code is None or not code.co_freevars or (called := names_called(code)) is None:
        return None
    cells = zip(code.co_freevars, getattr(wrapper, "__closure__", None) or (), strict=True)
    candidates = [
        index
        for index, (name, cell) in enumerate(cells)
        if name in called and isinstance(getattr(cell, "cell_contents", None), FunctionType)
    ]
    return candidates[0] if len(candidates) == 1 else None


nnsight_source.peel_index = peel_index
