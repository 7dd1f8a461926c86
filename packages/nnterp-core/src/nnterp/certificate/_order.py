"""Correct names by the order in which modules run: the final norm, and norms inside attention modules."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from nnterp.anatomy import Anatomy, Part
from nnterp.certificate._evidence import Evidence
from nnterp.discovery import Call
from nnterp.facts import Facts
from nnterp.record import replace
from nnterp.tensors import is_multiple


def corrected_by_order(evidence: Evidence, facts: Facts) -> Facts:
    """The facts with an anatomy that agrees with the order in which modules ran."""
    anatomy = _closing_norms(evidence, _final_norm(evidence, facts.anatomy))
    readout = replace(facts.readout, ln_final=anatomy.ln_final)
    return dataclasses.replace(facts, anatomy=anatomy, readout=readout)


def _final_norm(evidence: Evidence, anatomy: Anatomy) -> Anatomy:
    """Take for the final norm the one that runs between the last layer and the head, whatever it is called."""
    config = evidence.model.rename_config
    ran = evidence.ran(anatomy)
    if (config is not None and config.ln_final_name is not None) or not ran:
        return anatomy
    last, head = evidence.last_call(ran[-1].path), evidence.last_call(anatomy.lm_head)
    if last is None or head is None:
        return anatomy
    named = evidence.last_call(anatomy.ln_final)
    if named is not None and named.began > last.ended:
        return anatomy
    fitting = [
        (call.began, path)
        for path in evidence.norms()
        if (call := evidence.last_call(path)) is not None and last.ended < call.began < head.began
        if _may_feed(evidence, call, head)
    ]
    absent = dict(anatomy.absent)
    if fitting:
        absent.pop("ln_final", None)
        return dataclasses.replace(anatomy, ln_final=max(fitting)[1], absent=absent)
    absent["ln_final"] = "no norm between the last layer and the head returns what the head is given"
    return dataclasses.replace(anatomy, ln_final=None, absent=absent) if anatomy.ln_final is not None else anatomy


def _may_feed(evidence: Evidence, norm: Call, head: Call) -> bool:
    """Whether a norm returns what the head is given; without weights, whether it returns something of its shape."""
    made = norm.stream_out
    if made is None or head.stream_in is None or made.shape != head.stream_in.shape:
        return False
    return made.device.type == "meta" or is_multiple(head.stream_in, made, evidence.tolerance)


def _closing_norms(evidence: Evidence, anatomy: Anatomy) -> Anatomy:
    """Keep `Part.closing` only if that norm runs last in the part's module; else clear it."""

    def kept(part: Part) -> Part:
        if part.closing is None:
            return part
        call, closing = evidence.recording.call(part.exit), evidence.recording.call(part.closing)
        if call is None or closing is None:
            return dataclasses.replace(part, closing=None)
        later = any(
            closing.ended < inner.began < call.ended
            for path, calls in evidence.recording.calls.items()
            if path.startswith(f"{part.exit}.")
            for inner in calls
        )
        return dataclasses.replace(part, closing=None) if later else part

    return update_parts(anatomy, kept)


def update_parts(anatomy: Anatomy, update: Callable[[Part], Part]) -> Anatomy:
    """The anatomy with `update` applied to every layer's mixer and attention."""
    blocks = tuple(
        dataclasses.replace(
            layer,
            mixer=None if layer.mixer is None else update(layer.mixer),
            self_attn=None if layer.self_attn is None else update(layer.self_attn),
        )
        for layer in anatomy.blocks
    )
    return dataclasses.replace(anatomy, blocks=blocks) if blocks != anatomy.blocks else anatomy
