"""Claim: a row of a padded batch gives what the row gives alone; where it does not, padding is refused."""

from __future__ import annotations

import dataclasses
import math

import torch

from nnterp.certificate._certificate import Line
from nnterp.certificate._evidence import Claimed, Evidence, skipped
from nnterp.facts import Facts
from nnterp.huggingface import text_config
from nnterp.inputs import left_padded
from nnterp.tensors import relative_error

PADDING = "a padded batch equals its single rows"
PADDING_SLACK = 10  # masked positions still enter the kernels' sums, so rows agree to rounding, not to the bit


def padding(evidence: Evidence, facts: Facts) -> Claimed:
    """Rows of a left-padded batch equal the same prompts alone, or padding is refused.

    nnsight counts positions from each row's first token and passes them. RoBERTa and its kin count them differently,
    and correctly if nobody passes any: the model is given whichever is exact. Learns whether padding is exact, and
    whether positions are to be passed.
    """
    refused = "padding is refused, prompts of equal length share a batch"
    inexact = dataclasses.replace(facts, padding="inexact", positions_from_mask=True)
    if getattr(text_config(evidence.module.config), "index_topk", None):
        return skipped(PADDING, f"its indexer picks keys without regard to padding; {refused}"), inexact
    alone, inputs = evidence.recording.result.logits, _padded(evidence)
    best, failure = math.inf, ""
    with left_padded(evidence.model.tokenizer):
        for from_mask in (True, False):
            supposed = dataclasses.replace(facts, padding="exact", positions_from_mask=from_mask)
            model = evidence.model.supposing(supposed)
            try:
                with model.trace(inputs):
                    together = model.logits.save()
            except Exception as error:
                failure = failure or f"the model does not run on one ({type(error).__name__}: {str(error)[:80]})"
                continue
            error_ = relative_error(together[1:, evidence.pads :], alone)
            if error_ <= PADDING_SLACK * evidence.tolerance:
                detail = "left padding" if from_mask else "left padding, positions counted by the model itself"
                line = Line(PADDING, "passed", error_, PADDING_SLACK * evidence.tolerance, detail)
                return line, supposed
            best = min(best, error_)
    reason = failure if best == math.inf else f"HuggingFace's own forward is off by {best:.1e} under left padding"
    return skipped(PADDING, f"{reason}; {refused}"), inexact


def _padded(evidence: Evidence) -> dict[str, torch.Tensor]:
    """Two rows: one as long as the batch, and the probe behind padding."""
    pads = evidence.pads
    ids = evidence.probe_ids(2, evidence.length + pads, seed=1)
    ids[1:, pads:] = evidence.ids
    mask = torch.ones_like(ids)
    mask[1, :pads] = 0
    filler = getattr(evidence.model.tokenizer, "pad_token_id", None)
    if filler is not None:
        ids[1, :pads] = filler
    return {"input_ids": ids, "attention_mask": mask}
