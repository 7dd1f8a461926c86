"""Claim: every weight of the model was in the checkpoint, and the checkpoint has no layer weight beside them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from nnterp.certificate._evidence import Claimed, Evidence, outcome, skipped
from nnterp.facts import Facts

FILLED = "the checkpoint fills the model"
_DEPTHS = {"num_hidden_layers", "num_layers", "n_layer", "n_layers", "config"}


def filled(evidence: Evidence, facts: Facts) -> Claimed:
    """Read off what transformers said when it loaded the checkpoint. Learns nothing.

    Weights of the checkpoint that the model has no place for are named, and fail the line if they are a layer's: then
    the config describes another model. Towers and heads that the language model does without do not.
    """
    report = evidence.model.load_report
    if report is None:
        return skipped(FILLED, "the model was given as a module, so nothing is known of its checkpoint"), facts
    missing, mismatched, unexpected = (_names(report, k) for k in ("missing", "mismatched", "unexpected"))
    layers = f"{facts.anatomy.layers}."
    beside = [name for name in unexpected if name.startswith(layers)]
    if _DEPTHS & evidence.model.kwargs.keys():  # the user asked for another number of layers than the checkpoint has
        beside = [name for name in beside if _index(name.removeprefix(layers)) < len(facts.anatomy.passes)]
    said = [
        f"{len(names)} weights {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for names, what in (
            (missing, "are not in the checkpoint and are random"),
            (mismatched, "have another shape in the checkpoint and are random"),
            (unexpected, "of the checkpoint have no place in the model"),
        )
        if names
    ]
    ok = not (missing or mismatched or beside)
    remedy = "load the checkpoint with its own config, or pass the model as a module if this is meant"
    return outcome(FILLED, ok, detail="; ".join(said), remedy=remedy), facts


def _index(name: str) -> int:
    """The number that a name begins with; 0 if it begins with none."""
    number = name.partition(".")[0]
    return int(number) if number.isdigit() else 0


def _names(report: dict[str, Any], kind: str) -> list[str]:
    """The names under one kind; mismatched ones come with their shapes."""
    listed: Iterable[Any] = report.get(f"{kind}_keys") or ()
    return sorted(entry[0] if isinstance(entry, tuple) else str(entry) for entry in listed)
