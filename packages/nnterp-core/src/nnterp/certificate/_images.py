"""What holds of a model in runs with an image: claims tried on a prompt with an image that the user runs."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Mapping

import torch

from nnterp.certificate._certificate import Certificate, Line
from nnterp.certificate._certify import stamped
from nnterp.certificate._evidence import Claimed, Evidence, gather_images, outcome, shape_of, skipped
from nnterp.certificate._loops import read_at_seam
from nnterp.certificate._tower import features, tower
from nnterp.certificate._writes import written_at_once
from nnterp.defaults import plain_defaults
from nnterp.discovery import Vision, quiet
from nnterp.facts import Facts
from nnterp.huggingface import with_logits
from nnterp.inputs import Row
from nnterp.named_transformer import NamedTransformer
from nnterp.selectors import image_token_ids
from nnterp.tensors import relative_error

IMAGE_PARTS = "with an image, every layer runs once, on the prompt's own positions"
IMAGE_ENTERS = "the image enters the stream at its tokens, or by cross-attention"
IMAGE_STREAM = "with an image, each layer reads what the layer before it wrote"
IMAGE_HIDDEN = "with an image, layers_output equals HuggingFace's hidden states"
IMAGE_READOUT = "with an image, project_on_vocab(last layer) equals the logits"
IMAGE_WRITES = "with an image, every write equals a torch hook's"
IMAGE_COPIES = "copies of the prompt in one batch give what it gives alone"
EFFECT = 1e-6  # smallest relative change that counts as an effect


@plain_defaults()
def certify_images(model: NamedTransformer, row: Row) -> tuple[Certificate, Facts]:
    """Prove a model in runs with an image, on one prompt. The model is not changed.

    Args:
        model: The model, proven on text, its weights loaded.
        row: A prompt with an image.

    Returns:
        The certificate, failed lines included, and the facts with what was learnt, up to the first failure.
    """
    started = time.perf_counter()
    facts = dataclasses.replace(model.facts, vision=Vision())
    lines: list[Line] = []
    with quiet(model._module):
        evidence = gather_images(model, row)
        for claim in CLAIMS:
            line, facts = claim(evidence, facts)
            lines.append(line)
            if line.status == "failed":
                break
    return stamped(model, facts, lines, started), facts


def parts(evidence: Evidence, facts: Facts) -> Claimed:
    """Layers that run only with an image run here, too. Learns when each module runs."""
    wrong, previous = [], 0
    width = None
    for layer in facts.anatomy.blocks:
        calls = evidence.recording.calls.get(layer.path, [])
        if len(calls) != layer.turns and not (calls and layer.turns == 1 and layer.path in facts.repeated):
            wrong.append(f"{layer.path} ran {len(calls)} times")
            continue
        call = calls[layer.turn]
        out = call.stream_out
        width = shape_of(out) if width is None else width
        if out is None or shape_of(out) != width:
            wrong.append(f"{layer.path} returns {shape_of(out)} where the first layer returns {width}")
        elif evidence.length not in out.shape[:-1] and evidence.length + facts.readout.layout.extra not in out.shape:
            wrong.append(f"layers carry {shape_of(out)} for a prompt of {evidence.length} tokens")
        if call.began < previous:
            wrong.append(f"{layer.path} ran before the layer that precedes it")
        previous = call.ended
    logits = evidence.recording.result.logits
    if logits.shape[1] != evidence.length:
        wrong.append(f"there are logits at {logits.shape[1]} positions of {evidence.length} tokens")
    detail = "; ".join(wrong[:3]) or f"{facts.anatomy.num_layers} layers"
    vision = Vision(ticks=evidence.recording.ticks())
    return outcome(IMAGE_PARTS, not wrong, detail=detail, remedy=_REMEDY), dataclasses.replace(facts, vision=vision)


def enters(evidence: Evidence, facts: Facts) -> Claimed:
    """Another image changes the stream entering layer 0 at the image's tokens alone. Learns which tokens these are."""
    tokens = image_token_ids(evidence.module.config)
    other = gather_images(evidence.model, Row(tuple(evidence.ids[0].tolist())), _disturbed(evidence.beside))
    first = facts.anatomy.blocks[0].path
    before, after = evidence.recording.given(first), other.recording.given(first)
    assert before is not None
    assert after is not None
    moved = _positions(before, after, evidence)
    changed = relative_error(other.recording.result.logits, evidence.recording.result.logits)
    if not changed > EFFECT:
        return outcome(IMAGE_ENTERS, False, detail="another image gives the same logits", remedy=_REMEDY), facts
    ids = evidence.ids[0].tolist()
    if not tokens:  # the config names none: what stands where the image enters, and nowhere else
        inside = {ids[i] for i in moved}
        tokens = frozenset(inside - {token for i, token in enumerate(ids) if i not in moved})
    own = [i for i, token in enumerate(ids) if token in tokens]
    beyond = sorted(set(moved) - set(own))
    if beyond:
        detail = f"another image changes what enters layer 0 at positions {beyond[:5]}, which hold no image token"
        return outcome(IMAGE_ENTERS, False, detail=detail, remedy=_REMEDY), facts
    crossing = [b.index for b in facts.anatomy.blocks if b.kind == "cross_attention"]
    if not moved and not crossing:
        return outcome(IMAGE_ENTERS, False, detail="it does not enter at layer 0", remedy=_REMEDY), facts
    detail = f"at {len(moved)} of {len(own)} tokens" if moved else f"by cross-attention in layers {crossing}"
    vision = dataclasses.replace(facts.vision or Vision(), tokens=tokens if moved else frozenset())
    return outcome(IMAGE_ENTERS, True, detail=detail), dataclasses.replace(facts, vision=vision)


def stream(evidence: Evidence, facts: Facts) -> Claimed:
    """Between layers, the tower may add to the stream, at the image's tokens alone. Learns after which layers it does.

    What modules add that the text's certificate knows of is left out: BLT takes no images.
    """
    assert facts.vision is not None
    own = {i for i, token in enumerate(evidence.ids[0].tolist()) if token in facts.vision.tokens}
    worst, joined = 0.0, []
    for before, after in itertools.pairwise(facts.anatomy.blocks):
        made, given = evidence.of(before).made(before.path), evidence.of(after).given(after.path)
        if after.index in facts.anatomy.seams and read_at_seam(evidence, [*facts.anatomy.blocks], after) is not None:
            continue
        if made is None or given is None or made.shape != given.shape:
            detail = f"{after.path} is given {shape_of(given)}, {before.path} returns {shape_of(made)}"
            return outcome(IMAGE_STREAM, False, detail=detail, remedy=_REMEDY), facts
        moved = _positions(made, given, evidence)
        if moved and not own.issuperset(moved):
            detail = f"between {before.path} and {after.path}, at positions {sorted(set(moved) - own)[:5]}"
            return outcome(IMAGE_STREAM, False, detail=detail, remedy=_REMEDY), facts
        if moved:
            joined.append(before.index)
        else:
            worst = max(worst, relative_error(given, made))
    detail = f"and what the tower adds at the image's tokens after layers {joined}" if joined else ""
    line = outcome(IMAGE_STREAM, True, worst, evidence.tolerance, detail)
    vision = dataclasses.replace(facts.vision, joined=tuple(joined))
    return line, dataclasses.replace(facts, vision=vision)


def hidden_states(evidence: Evidence, facts: Facts) -> Claimed:
    """What leaves a layer, or enters the next, is HuggingFace's hidden state. Learns nothing."""
    hidden, blocks = getattr(evidence.recording.result, "hidden_states", None), facts.anatomy.blocks
    if hidden is None or facts.readout.layout.stored is not None or facts.readout.layout.streams > 1:
        return skipped(IMAGE_HIDDEN, "the model returns none, or several streams"), facts
    if len(hidden) not in (len(blocks), len(blocks) + 1):
        return outcome(IMAGE_HIDDEN, False, detail=f"HuggingFace returns {len(hidden)}", remedy=_REMEDY), facts
    own = hidden[1:] if len(hidden) > len(blocks) else hidden
    worst, where = 0.0, ""
    for layer, state in zip(blocks[:-1], own, strict=False):
        after = blocks[layer.index + 1]
        made, given = evidence.of(layer).made(layer.path), evidence.of(after).given(after.path)
        errors = [relative_error(x, state) for x in (made, given) if x is not None]
        if not min(errors) <= worst:
            worst, where = min(errors), layer.path
    ok = worst <= evidence.tolerance
    return outcome(IMAGE_HIDDEN, ok, worst, evidence.tolerance, "" if ok else where, _REMEDY), facts


def readout(evidence: Evidence, facts: Facts) -> Claimed:
    """The readout that was proven on text. Learns nothing."""
    if facts.readout.way in ("none", "unproven"):
        return skipped(IMAGE_READOUT, "the text's certificate proves no readout"), facts
    end = facts.anatomy.blocks[-1]
    last = evidence.of(end).made(end.path)
    assert last is not None
    project = facts.readout.by_chain if facts.readout.way == "chain" else facts.readout.by_replay
    try:
        made = project(evidence.module, evidence.own_positions(facts, last))
        error = relative_error(made, evidence.recording.result.logits)
    except Exception as problem:
        return outcome(IMAGE_READOUT, False, detail=f"{type(problem).__name__}: {problem}"[:200]), facts
    ok = error <= evidence.tolerance
    return outcome(IMAGE_READOUT, ok, error, evidence.tolerance, str(facts.readout) if ok else "", _REMEDY), facts


def writes(evidence: Evidence, facts: Facts) -> Claimed:
    """Learns nothing."""
    try:
        number, error = written_at_once(evidence, facts)
    except Exception as problem:
        return outcome(IMAGE_WRITES, False, detail=f"{type(problem).__name__}: {problem}"[:200]), facts
    return outcome(IMAGE_WRITES, error <= evidence.tolerance, error, evidence.tolerance, f"{number} values"), facts


def copies(evidence: Evidence, facts: Facts) -> Claimed:
    """Learns whether copies may share a batch; where not, sweeps run them one by one."""
    assert facts.vision is not None
    twice = {name: torch.cat([tensor] * 2) for name, tensor in evidence.beside.items()}
    try:
        with torch.no_grad():
            both = with_logits(evidence.module(input_ids=evidence.ids.repeat(2, 1), **twice)).logits
        single = evidence.recording.result.logits
        error = max(relative_error(both[i : i + 1], single) for i in (0, 1))
    except Exception as problem:
        return skipped(IMAGE_COPIES, f"they are run one by one ({type(problem).__name__})"), facts
    if not error <= evidence.tolerance:
        return skipped(IMAGE_COPIES, f"they are run one by one (off by {error:.1e} together)"), facts
    vision = dataclasses.replace(facts.vision, copies=True)
    return outcome(IMAGE_COPIES, True, error, evidence.tolerance), dataclasses.replace(facts, vision=vision)


CLAIMS: tuple[Callable[[Evidence, Facts], Claimed], ...] = (
    parts,
    enters,
    stream,
    hidden_states,
    readout,
    writes,
    tower,
    features,
    copies,
)
_REMEDY = "nnterp cannot run images through this model; texts run as proven"


def _disturbed(beside: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same image with other pixels: the brightness of each is negated and shifted."""
    given = dict(beside)
    for name, tensor in given.items():
        if ("pixel" in name or "patches" in name) and tensor.is_floating_point():
            lead = tensor[..., :2] if name == "flattened_patches" else tensor[..., :0]  # rows and columns
            given[name] = torch.cat([lead, 0.7 - tensor[..., lead.shape[-1] :].flip(0) * 0.9], -1)
    return given


def _positions(before: torch.Tensor, after: torch.Tensor, evidence: Evidence) -> list[int]:
    """The positions of the prompt at which two streams differ by more than rounding."""
    change = (after - before).float().abs()
    axis = change.shape.index(evidence.length)
    size = before.float().abs().amax().clamp(min=1e-30)
    other = [i for i in range(change.dim()) if i != axis]
    return (change.amax(other) > evidence.tolerance * size).nonzero()[:, 0].tolist()
