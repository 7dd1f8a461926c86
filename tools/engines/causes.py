"""What was found out by hand about numbers that differ: one row for each kind."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cause:
    """Why some numbers of an engine differ: in which cells, of which model types, and how that was seen."""

    engine: str
    cells: tuple[str, ...]
    types: tuple[str, ...]
    why: str
    seen: str = ""


CAUSES: tuple[Cause, ...] = ()


def cause_of(engine: str, cell: str, model_type: str) -> Cause | None:
    """The cause of one number that differs, if it was looked into."""
    for cause in CAUSES:
        if cause.engine == engine and cell in cause.cells and model_type in cause.types:
            return cause
    return None
