"""Claim: projecting what leaves the last layer gives the logits, and the final norm and the head carry it there."""

from __future__ import annotations

import dataclasses
import math

import torch

from nnterp.certificate._evidence import REMEDY_ENDS, Claimed, Evidence, outcome, shape_of, skipped
from nnterp.facts import Facts
from nnterp.record import replace
from nnterp.tensors import is_multiple, relative_error
from nnterp.traced import Readout, Way

READOUT = "project_on_vocab(last layer) equals the logits"


def readout(evidence: Evidence, facts: Facts) -> Claimed:
    """Learns which way of projecting holds: the chain of norm and head, the model's own code, or none."""
    end = evidence.ran(facts.anatomy)[-1]
    last = evidence.of(end).made(end.path)
    assert last is not None
    flow = _flow_problem(evidence, facts)
    tried: list[tuple[float, str]] = []
    ways: tuple[Way, ...] = ("chain", "replay")
    for way in ways:
        error, problem = _error_of(evidence, facts, way, last)
        if error <= evidence.tolerance:
            found = replace(facts.readout, way=way)
            ok = way == "chain" or not flow
            line = outcome(READOUT, ok, error, evidence.tolerance, str(found) if ok else flow, REMEDY_ENDS)
            return line, dataclasses.replace(facts, readout=found)
        tried.append((error, f"{way}: {problem}"))
    if flow or evidence.named("ln_final_name", "lm_head_name"):
        detail = flow or "; ".join(reason for _, reason in tried)
        return outcome(READOUT, False, min(e for e, _ in tried), evidence.tolerance, detail, REMEDY_ENDS), facts
    reason = "its logits depend on more than what leaves the last layer"
    line = skipped(READOUT, f"{reason}: hidden states cannot be projected on the vocabulary")
    return line, dataclasses.replace(facts, readout=replace(facts.readout, way="none", reason=reason))


def _error_of(evidence: Evidence, facts: Facts, way: Way, last: torch.Tensor) -> tuple[float, str]:
    """How far the logits are that one way makes, and in words."""
    found: Readout = facts.readout
    project = found.by_chain if way == "chain" else found.by_replay
    try:
        made = project(evidence.module, evidence.own_positions(facts, last))
    except Exception as error:
        return math.inf, f"{type(error).__name__}: {str(error)[:80]}"
    error_ = relative_error(made, evidence.recording.result.logits) if isinstance(made, torch.Tensor) else math.inf
    return error_, f"off by {error_:.1e}"


def _flow_problem(evidence: Evidence, facts: Facts) -> str:
    """What is wrong with the way from the final norm through the head to the logits; "" if nothing is.

    Follows tensors from module to module: the head must return what becomes the logits, and what it is given must be
    what the final norm returned, possibly through other modules and up to a factor.
    """
    head, norm = facts.anatomy.lm_head, facts.anatomy.ln_final
    logits = evidence.recording.result.logits
    if head is None:
        return "no head was found"
    call = evidence.last_call(head)
    made = None if call is None else call.stream_out
    if call is None or made is None or made.shape[-1] != logits.shape[-1]:
        return f"lm_head ({head}) returns {shape_of(made)}, the logits are {shape_of(logits)}"
    if not _same_ranking(made, logits):
        return f"the logits are not a function of what lm_head ({head}) returns"
    if norm is None or call.stream_in is None:
        return ""
    start = evidence.last_call(norm)
    if start is None or start.stream_out is None:
        return f"ln_final ({norm}) returned nothing"
    reached = [start.stream_out]
    for step in sorted((calls[-1] for calls in evidence.recording.calls.values()), key=lambda c: c.began):
        if not start.ended < step.began < call.began or step.stream_in is None or step.stream_out is None:
            continue
        if any(is_multiple(step.stream_in, r, evidence.tolerance) for r in reached):
            reached.append(step.stream_out)
    if any(is_multiple(call.stream_in, r, evidence.tolerance) for r in reached):
        return ""
    return f"lm_head ({head}) is not given what ln_final ({norm}) returns"


def _same_ranking(raw: torch.Tensor, logits: torch.Tensor) -> bool:
    """Whether logits rank tokens as the head's output does, up to a sign: true of scales and softcaps.

    Of a head that unembeds several streams, one output must.
    """
    if raw.dim() == logits.dim() + 1:
        return any(_same_ranking(one, logits) for axis in range(raw.dim() - 1) for one in raw.unbind(axis))
    if raw.shape != logits.shape:
        return False
    row, out = raw.reshape(-1, raw.shape[-1])[-1].double(), logits.reshape(-1, logits.shape[-1])[-1].double()
    order = row.argsort()
    steps = out[order].diff()
    slack = 1e-4 * (out.max() - out.min())
    return bool((steps >= -slack).all() or (steps <= slack).all())
