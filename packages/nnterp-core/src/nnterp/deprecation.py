"""What still works and will not for ever: one warning for all of it, shown at the line that uses it."""

from __future__ import annotations

import sys
import warnings

_INSIDE = frozenset(["nnterp", "nnsight", "contextlib"])  # packages whose lines are not the user's


def deprecated(old: str, instead: str, removed_in: str) -> None:
    """Warn that `old` goes away in version `removed_in` of its package.

    The warning stands at the nearest line that is neither nnterp's nor nnsight's, because Python shows a
    `DeprecationWarning` only if it comes from the user's own program. Nothing else in nnterp raises one, and a test
    fails once a package has reached the version in which something was to go.

    Args:
        old: What was used, as it is written: "`steer(positions=)`".
        instead: What to write instead: "`token_positions=`".
        removed_in: The version without it, "3.0".
    """
    depth, frame = 2, sys._getframe(1)
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in _INSIDE:
        depth, frame = depth + 1, frame.f_back
    message = f"{old} is deprecated and goes away in {removed_in}: use {instead}."
    warnings.warn(message, DeprecationWarning, stacklevel=depth)
