"""Claim: a row of a padded batch gives what the row gives alone; where it does not, padding is refused."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch

from nnterp.certificate._certificate import Line
from nnterp.certificate._evidence import Claimed, Evidence, skipped
from nnterp.facts import Facts
from nnterp.huggingface import accepts_argument
from nnterp.inputs import context_length, left_padded
from nnterp.named_transformer import NamedTransformer
from nnterp.tensors import relative_error
from nnterp.traced import Sharing

PADDING = "a padded batch equals its single rows"
PADDING_SLACK = 10  # masked positions still enter the kernels' sums, so rows agree to rounding, not to the bit
SHORTEST = 2  # tokens of a padded row below which there is nothing to compare
CHEAP = 64  # a switch is run across if that takes rows of at most so many tokens


def padding(evidence: Evidence, facts: Facts) -> Claimed:
    """Rows of a left-padded batch equal the same prompts alone, or padding is refused.

    Rows whose lengths may not share a batch by the model's config and rotary embeddings (`facts.thresholds`) are not
    put into one here either. The longer row stands at the end of the model's context, so a threshold that was not found
    shows. nnsight counts positions from each row's first token and passes them. RoBERTa and its kin count them
    differently, and correctly if nobody passes any: the model is given whichever is exact. Learns whether padding is
    exact, and whether positions are to be passed.
    """
    refused = "padding is refused, prompts of equal length share a batch"
    inexact = dataclasses.replace(facts, padding="inexact", positions_from_mask=True)
    sizes = list(_sizes(evidence, facts.thresholds))
    if not sizes:
        reason = f"its rows may share a batch only up to {facts.thresholds.limit} tokens, too few to try"
        return skipped(PADDING, f"{reason}; {refused}"), inexact
    tolerance, best, failure = PADDING_SLACK * evidence.tolerance, math.inf, ""
    with left_padded(evidence.model.tokenizer):
        for from_mask in (True, False):
            supposed = dataclasses.replace(facts, padding="exact", positions_from_mask=from_mask)
            model = evidence.model.supposing(supposed)
            far = _farthest(evidence, model, sum(sizes[0])) if from_mask else None
            apart = math.inf if far is None else _apart(evidence, model, *sizes[0], far)
            try:  # beside a distant row is as good as beside a near one
                error = max([0.0, *(_error(evidence, model, *size) for size in sizes[apart <= tolerance :])])
            except Exception as raised:
                failure = failure or f"the model does not run on one ({type(raised).__name__}: {str(raised)[:80]})"
                continue
            if error > tolerance:
                best = min(best, error)
                continue
            if tolerance < apart < math.inf:
                reason = f"beside a row that ends at position {far}, a row is off by {apart:.1e}"
                return skipped(PADDING, f"{reason}; {refused}"), inexact
            detail = "left padding" if from_mask else "left padding, positions counted by the model itself"
            if facts.thresholds != Sharing():
                detail += f", {facts.thresholds}"
            worst = max(error, apart) if apart < math.inf else error
            return Line(PADDING, "passed", worst, tolerance, detail), supposed
    reason = failure if best == math.inf else f"HuggingFace's own forward is off by {best:.1e} under left padding"
    return skipped(PADDING, f"{reason}; {refused}"), inexact


def _sizes(evidence: Evidence, sharing: Sharing) -> Iterator[tuple[int, int]]:
    """(tokens of a row, padding in front of it) of the batches to run: below every threshold, and across where cheap.

    The probe's own size if no threshold is as short.
    """
    length, pads = evidence.length, evidence.pads
    most = [*sharing.switches, *([] if sharing.limit is None else [sharing.limit])]
    width = min([length + pads, *most])
    if width < length + pads:
        pads = min(pads, width // 2)
        length = width - pads
    if length >= SHORTEST and pads > 0:
        yield length, pads
    context = context_length(evidence.model)
    for switch in sharing.switches:
        above = switch + 1, evidence.pads
        fits = sum(above) <= min(n for n in (CHEAP, context, sharing.limit) if n is not None)
        if fits and sharing.side(above[0]) == sharing.side(sum(above)):
            yield above


def _farthest(evidence: Evidence, model: NamedTransformer, width: int) -> int | None:
    """Up to which position the row beside a padded one may reach; None if it cannot be moved from where it stands.

    Only models with rotary modules are asked: where positions have a table, they say nothing of each other.
    """
    rotary = any("rotary" in type(inner).__name__.lower() for inner in evidence.module.modules())
    context, sharing = context_length(model), model.sharing
    if not rotary or context is None or not accepts_argument(evidence.module, "position_ids"):
        return None
    end = min(n for n in (context, sharing.limit, *sharing.switches) if n is not None)
    return end if end > width else None


def _apart(evidence: Evidence, model: NamedTransformer, length: int, pads: int, end: int) -> float:
    """As `_error`, beside a row that ends at a distant position; infinite if the model cannot be run like that."""
    try:
        return _error(evidence, model, length, pads, end)
    except Exception:
        return math.inf


def _error(evidence: Evidence, model: NamedTransformer, length: int, pads: int, end: int | None = None) -> float:
    """The largest relative error of a row of `length` tokens behind `pads` of padding, beside a row that has none.

    Args:
        evidence: The plain model's run.
        model: The model.
        length, pads: The padded row.
        end: Up to which position the other row reaches; its length if None.
    """
    inputs = _padded(evidence, length, pads)
    own = inputs["input_ids"][1:, pads:]
    alone = evidence.recording.result.logits if length == evidence.length else evidence.forward(own).logits
    if end is not None:
        positions = inputs["attention_mask"].cumsum(-1).sub(1).clamp(min=0)
        positions[0] += end - length - pads
        inputs["position_ids"] = positions
    with model.trace(inputs):
        together = model.logits.save()
    return relative_error(together[1:, pads:], alone)


def _padded(evidence: Evidence, length: int, pads: int) -> dict[str, torch.Tensor]:
    """Two rows: one as long as the batch, and the first `length` tokens of the probe behind padding."""
    ids = evidence.probe_ids(2, length + pads, seed=1)
    if length <= evidence.length:
        ids[1:, pads:] = evidence.ids[:, :length]
    mask = torch.ones_like(ids)
    mask[1, :pads] = 0
    filler = getattr(evidence.model.tokenizer, "pad_token_id", None)
    if filler is not None:
        ids[1, :pads] = filler
    return {"input_ids": ids, "attention_mask": mask}
