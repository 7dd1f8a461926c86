"""Claim: in a looped model, what is read of every run of a layer is what a torch hook sees in that run."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from nnterp.certificate._evidence import Claimed, Evidence, Pair, compared, outcome
from nnterp.certificate._writes import Target, targets_of
from nnterp.facts import Facts
from nnterp.traced import read_value

PASSES = "every pass of a layer equals a torch hook's"


def passes(evidence: Evidence, facts: Facts) -> Claimed:
    """Covers all values that are a module's input or output. Learns nothing; `writes` proves the writes."""
    model, targets = evidence.model.supposing(facts), targets_of(evidence, facts)
    read = []
    try:
        with model.trace(evidence.inputs(evidence.ids)):
            for target in targets:
                read.append(read_value(model, target.value.label, target.layer).detach().clone())
    except Exception as problem:
        return outcome(PASSES, False, detail=f"{type(problem).__name__}: {str(problem)[:200]}"), facts

    def pairs() -> Iterator[Pair]:
        for target, found in zip(targets, read, strict=True):
            seen = _seen(evidence, target)
            if seen is not None:
                yield str(target), found, evidence.own_positions(facts, seen).reshape(found.shape)

    anatomy = facts.anatomy
    detail = f"{len(targets)} values in {anatomy.num_layers} runs of {len(anatomy.runs)} layers"
    return compared(PASSES, pairs(), evidence.tolerance, "nnterp cannot serve such a model", detail), facts


def _seen(evidence: Evidence, target: Target) -> torch.Tensor | None:
    call = evidence.recording.calls[target.site.path][target.call]
    return call.stream_in if target.site.side == "input" else call.stream_out
