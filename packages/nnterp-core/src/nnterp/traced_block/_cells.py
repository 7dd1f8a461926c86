"""The source of notebook cells that a magic runs (`%%time`, `%%timeit`, `%%prun`): IPython does not keep it."""

from __future__ import annotations

import linecache
import sys
from types import FrameType
from typing import Any

from nnsight.tracing.globals import BLOCKS, SOURCES

_MAGICS = "IPython.core.magics.execution"
_forgotten: list[Any] = []  # blocks of earlier cells: kept, because what is known of a block is kept by its node's id


def know_cell() -> None:
    """If a magic is running a cell, give nnsight the cell's source, under the file name of the code that runs.

    Does nothing outside of IPython. All cells of a magic have one file name: blocks of earlier cells are forgotten.
    """
    if _MAGICS not in sys.modules:
        return
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") == _MAGICS:
            filename, source = _of_magic(frame)
            if source is not None:
                _register(filename, source)
        frame = frame.f_back


def _of_magic(frame: FrameType) -> tuple[str, str | None]:
    """The file name that a magic compiles a cell for, and the cell, if the frame is that of a magic running one."""
    own = frame.f_locals
    match frame.f_code.co_name:
        case "time":
            return "<timed exec>", own.get("expr")
        case "timeit" if "transform" in own:
            return "<magic-timeit>", own["transform"](own["stmt"] if own["cell"] is None else own["cell"])
        case "_run_with_profiler":
            return "<string>", own.get("code")
    return "", None


def _register(filename: str, source: str) -> None:
    if SOURCES.get(filename) == source:
        return
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    SOURCES.pop(filename, None)
    _forgotten.extend(BLOCKS.pop(key) for key in [key for key in BLOCKS if key[0] == filename])
