"""Comparing the settings of two runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nnterp.identity._functions import ATTRIBUTE

CHANGES = "changes during the run"  # stands for a value that the run itself changes, such as a counter


def differences(earlier: Mapping[str, Any], current: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Compare the settings of two runs.

    What the earlier run marked as changed by itself is not compared, and marked in `current` as well.

    Returns:
        Two lists of texts that name what differs. The first is of differences that make it another run. The second is
        of attributes of a callable object, which may be counters or caches.
    """
    serious: list[str] = []
    attributes: list[str] = []
    for key, now in current.items():
        then = earlier.get(key)
        if not isinstance(now, dict) or not isinstance(then, Mapping):
            if not same(then, now):
                serious.append(f"{key}={then!r}, and this run has {now!r}")
            continue
        for name in {**then, **now}:
            if CHANGES in (then.get(name), now.get(name)):
                now[name] = CHANGES
            elif not same(then.get(name), now.get(name)):
                place = f"{key}[{name!r}]" if key == "func_kwargs" else f"{name} of get_probs_func"
                text = f"{place} = {then.get(name)!r}, and this run has {now.get(name)!r}"
                (attributes if name.startswith(ATTRIBUTE) and key == "function" else serious).append(text)
    return serious, attributes


def same(one: Any, other: Any) -> bool:
    """Return True for equal values of one type: 1 is neither 1.0 nor True."""
    return type(one) is type(other) and one == other
