"""What can be held still in a backward pass, and how a user says so."""

from __future__ import annotations

from typing import Any

FROZEN = ("patterns", "norms", "gates")


def frozen_kinds(given: Any) -> tuple[str, ...]:
    """Read what a user wants held still.

    Args:
        given: One of `FROZEN`, several of them, or nothing: `()` or None.

    Returns:
        The names, in the order of `FROZEN`.

    Raises:
        TypeError: It is no text and no list of texts.
        ValueError: It names something else.
    """
    if given is None:
        return ()
    listed = [given] if isinstance(given, str) else given
    if not isinstance(listed, (list, tuple, set, frozenset)) or not all(isinstance(name, str) for name in listed):
        raise TypeError(f'frozen is some of {FROZEN}, such as frozen=("patterns", "norms"), not {given!r:.80}.')
    unknown = [name for name in listed if name not in FROZEN]
    if unknown:
        raise ValueError(
            f"frozen={given!r:.80}: {unknown[0]!r} cannot be held still; there are {', '.join(map(repr, FROZEN))}."
        )
    return tuple(kind for kind in FROZEN if kind in listed)
