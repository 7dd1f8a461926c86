"""What still works and will not for ever: one warning for all of it, shown at the line that uses it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from nnterp.warn import warn

P = ParamSpec("P")
T = TypeVar("T")


def deprecated(old: str, instead: str, removed_in: str) -> None:
    """Warn that `old` goes away in version `removed_in` of its package.

    Nothing else in nnterp raises a `DeprecationWarning`, and a test fails once a package has reached the version in
    which something was to go. Python shows one only if it comes from the user's own program; see `nnterp.warn`.

    Args:
        old: What was used, as it is written: "`steer(positions=)`".
        instead: What to write instead: "`token_positions=`".
        removed_in: The version without it, "3.0".
    """
    warn(f"{old} is deprecated and goes away in {removed_in}: use {instead}.", DeprecationWarning)


def renamed(removed_in: str, **names: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Let a function take arguments by the names they had, with a warning.

    Args:
        removed_in: As in `deprecated`.
        **names: Each old name, and the one that it has now.

    Raises:
        TypeError: A call of the function gives an argument by both names.
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(function)
        def called(*args: Any, **kwargs: Any) -> T:
            for old in names.keys() & kwargs.keys():
                new, what = names[old], getattr(function, "__name__", "a function")
                if new in kwargs:
                    raise TypeError(f"{what}() was given {new}= and {old}=, its old name; give the first alone.")
                deprecated(f"`{what}({old}=)`", f"`{new}=`", removed_in)
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return called

    return decorate
