"""Claim: a trace that writes nothing gives HuggingFace's own logits, bit for bit."""

from __future__ import annotations

import torch

from nnterp.certificate._evidence import Claimed, Evidence, outcome
from nnterp.facts import Facts
from nnterp.huggingface import accepts_argument, with_logits
from nnterp.tensors import relative_error
from nnterp.traced import EditedLater

IDLE = "the forward with nnterp is bit-equal to the one without"


def idle_trace(evidence: Evidence, facts: Facts) -> Claimed:
    """Learns nothing."""
    model, plain = evidence.model.supposing(facts), evidence.recording.result.logits
    inputs = evidence.inputs(evidence.ids)
    ticks = evidence.recording.ticks()
    edited = sorted(facts.edited_later, key=lambda at: ticks[at[0], (), at[1]])
    # The model goes on with copies of these, which must not change its logits.
    handed = [EditedLater(path, side) for path, side in edited if side == "output"]
    with model.trace(inputs):
        for place in handed:
            place.read(model, str(place))
        traced = model.logits.save()
    if not torch.equal(traced, plain):  # it may have been computed without a mask or a cache
        takes_mask = accepts_argument(evidence.module, "attention_mask")
        mask = {"attention_mask": torch.ones_like(evidence.ids)} if takes_mask and "input_ids" in inputs else {}
        if "decoder_input_ids" in inputs and "input_ids" in inputs:
            mask = {"attention_mask": torch.ones_like(inputs["input_ids"])}
        plain = with_logits(evidence.module(**inputs, **mask)).logits
    return outcome(IDLE, torch.equal(traced, plain), relative_error(traced, plain), evidence.tolerance), facts
