"""Values of a model that nothing has proven: served only if what names alone assume holds in a run."""

from __future__ import annotations

from nnterp.errors import Unproven, UnprovenWarning
from nnterp.facts import Facts
from nnterp.table import Value
from nnterp.warn import warn


def require_assumed(facts: Facts, value: Value) -> None:
    """Raise for a value that names alone would get wrong; see `nnterp.discovery.Assumed`. Nothing once it is proven.

    Raises:
        Unproven: Layers (or, for a value of one module beside them, that module) run several times. Or the value is the
            input or output of a part, and the stream is not stored as `[batch, seq, hidden]`.

    Warns:
        UnprovenWarning: The model could not be run, so that it is unknown.
    """
    if value.stack == "vision":
        return
    anatomy, assumed = facts.anatomy, facts.assumed
    if assumed.unknown:
        warn(
            f"{anatomy.model_class}: {value.name} is served as if every layer ran once in a forward pass, on a stream "
            f"[batch, seq, hidden]. Nothing has proven that: {assumed.unknown}.",
            UnprovenWarning,
        )
    path = None if value.per_layer or value.role is None else getattr(anatomy, value.role, None)
    wrong = assumed.wrong_of(path, of_stream=value.side is not None)
    if wrong:
        raise Unproven(
            f"{anatomy.model_class}: {value.name} is not served by names alone, because {wrong}. Call "
            "model.validate(), which proves what is there and serves it, or read modules as nnsight does "
            "(model.layers[i].output): what a module returns, as it is, in its first run."
        )
