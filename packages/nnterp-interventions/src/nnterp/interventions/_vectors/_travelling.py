"""What a vector becomes when it is unpickled: itself, or its directions on a worker that does not have this library."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any


def restored(directions: dict[int, Any], record: dict[str, Any]) -> Any:
    """The vector; on a worker an object that has only its `directions`."""
    here = sys.modules.get("nnterp.interventions")
    return SimpleNamespace(directions=directions) if here is None else here.SteeringVector(directions, **record)
