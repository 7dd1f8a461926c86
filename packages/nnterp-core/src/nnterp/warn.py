"""Warnings that are shown at the user's own line."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from types import FrameType

# Packages whose lines may stand between the user's line and the one that warns: nnterp's own, nnsight's in a trace, and
# those that decorators and context managers bring.
_BETWEEN = frozenset(["nnterp", "nnsight", "contextlib", "torch", "transformers"])


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the nearest line that is the user's.

    Args:
        message: What to say.
        category: The class of the warning.
    """
    frames = list(_frames(sys._getframe(1)))
    modules: dict[str, str] = {}  # of files: the block of a trace does not know its module, the code around it does
    for frame in frames:
        modules[frame.f_code.co_filename] = modules.get(frame.f_code.co_filename) or frame.f_globals.get("__name__", "")
    names = [frame.f_globals.get("__name__") or modules[frame.f_code.co_filename] or "__main__" for frame in frames]
    at = next((i for i, name in enumerate(names) if name.partition(".")[0] not in _BETWEEN), len(frames) - 1)
    known = vars(sys.modules[names[at]]) if names[at] in sys.modules else frames[at].f_globals
    registry, line = known.setdefault("__warningregistry__", {}), frames[at].f_lineno
    warnings.warn_explicit(message, category, frames[at].f_code.co_filename, line, names[at], registry)


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    """A frame and those that called it: a trace's block runs in a greenlet, which has a stack of its own."""
    greenlet = sys.modules.get("greenlet")
    running = None if greenlet is None else greenlet.getcurrent()
    while frame is not None:
        yield frame
        frame = frame.f_back
        while frame is None and running is not None and (running := running.parent) is not None:
            frame = running.gr_frame
