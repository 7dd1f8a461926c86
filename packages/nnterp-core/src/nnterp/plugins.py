"""What installed packages offer each other without importing each other: entry points, by group and name."""

from __future__ import annotations

from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

COMMANDS = "nnterp.commands"
FIGURES = "nnterp.figures"


@cache
def _points(group: str) -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=group)}


def names(group: str) -> tuple[str, ...]:
    """Names registered in a group by the packages that are installed."""
    return tuple(sorted(_points(group)))


def load(group: str, name: str) -> Any:
    """The object registered under a name, or None if no installed package registers it."""
    point = _points(group).get(name)
    return None if point is None else point.load()
