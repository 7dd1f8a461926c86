"""Claim: the feed-forward treats every position alone, and the mixer does not."""

from __future__ import annotations

from collections.abc import Callable

import torch

from nnterp.anatomy import Part
from nnterp.certificate._evidence import REMEDY_PARTS, Claimed, Evidence, outcome
from nnterp.discovery import Call, mixes_rows
from nnterp.facts import Facts
from nnterp.tensors import relative_error, stream_out

ROLES = "the MLP is position-wise and the mixer is not"
CHANGED = 1  # the position whose input is changed to see what else changes


def roles(evidence: Evidence, facts: Facts) -> Claimed:
    """Told by calling parts again on edited inputs. Learns nothing."""
    if reason := mixes_rows(evidence.module):
        return outcome(ROLES, False, detail=reason), facts
    problems: list[str] = []
    mixing: set[type] = set()
    still: list[tuple[type, str]] = []
    for layer in evidence.ran(facts.anatomy):
        call = evidence.recording.call(layer.path)
        if call is None or layer.turn:
            continue
        for part in dict.fromkeys(p for p in (layer.self_attn, layer.mixer) if p is not None):
            found, kind = _mixes(evidence, facts, call, part), type(evidence.module.get_submodule(part.entry))
            if found:
                mixing.add(kind)
            elif found is False:
                still.append((kind, f"{part} ({layer.kind}) does not move information between positions"))
        if layer.mlp is None:
            continue
        shifts_tokens = layer.kind == "recurrent"  # RWKV's channel mix does
        if not shifts_tokens and _mixes(evidence, facts, call, layer.mlp):
            problems.append(f"{layer.mlp} moves information between positions")
        if _is_norm(evidence, call, layer.mlp):
            problems.append(f"{layer.mlp} is a norm, not a feed-forward")
    # A layer that borrows another's keys and values mixes nothing of its own input; its class mixes elsewhere.
    problems += [problem for kind, problem in still if kind not in mixing]
    return outcome(ROLES, not problems, detail="; ".join(problems[:3]), remedy=REMEDY_PARTS), facts


def _mixes(evidence: Evidence, facts: Facts, layer: Call, part: Part) -> bool | None:
    """Whether an early position's input changes other positions' output; None if the part cannot be called alone."""
    if part.entry != part.exit:
        ends = [_mixes(evidence, facts, layer, Part.module(path)) for path in (part.entry, part.exit)]
        return None if all(f is None for f in ends) else any(ends)
    call = evidence.recording.within(part.entry, layer)
    before = None if call is None else call.stream_out
    after = _call_again(evidence, layer, part.entry, lambda x: _one_position_changed(evidence, facts, x))
    if before is None or after is None or before.dim() < 2 or before.shape != after.shape:
        return None
    before, after = evidence.batch_first(facts, before), evidence.batch_first(facts, after)
    if before.dim() == 2:  # positions and batch on one axis
        before, after = before[None], after[None]
    change = (after.double() - before.double()).abs().amax(dim=(0, -1))
    while change.dim() > 1:
        change = change.amax(dim=0)
    if change.max() <= evidence.tolerance * before.double().abs().max().clamp(min=1e-30):
        return None
    return bool(torch.cat([change[:CHANGED], change[CHANGED + 1 :]]).max() > 1e-3 * change.max())


def _one_position_changed(evidence: Evidence, facts: Facts, x: torch.Tensor) -> torch.Tensor:
    """The stream with one position replaced by another direction of about the same size, in place."""
    shown = evidence.batch_first(facts, x)
    where = (slice(None), CHANGED) if x.dim() > 2 else (CHANGED,)
    shown[where] = shown[where].roll(1, -1) * 1.5 + 0.1 * shown[where].abs().mean()
    return x


def _is_norm(evidence: Evidence, layer: Call, part: Part) -> bool:
    """Whether a part has no matrices and returns the same for twice its input."""
    module = evidence.module.get_submodule(part.entry)
    if part.entry != part.exit or any(p.dim() > 1 for p in module.parameters()):
        return False
    call = evidence.recording.within(part.entry, layer)
    before = None if call is None else call.stream_out
    if before is None or not bool(before.any()):  # what returns zeros is no norm
        return False
    after = _call_again(evidence, layer, part.entry, lambda x: 2 * x)
    return after is not None and relative_error(after, before) < 1e-2


def _call_again(
    evidence: Evidence, layer: Call, path: str, edit: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor | None:
    """Call one module again on the arguments it had in a layer, the stream among them edited; None if it fails."""
    call = evidence.recording.within(path, layer)
    stream = None if call is None else call.stream_in
    if call is None or stream is None:
        return None
    # Some attentions are given the stream several times, as query, key and value, each in a form of its own.
    mine = [x for x in call.floats_in if x.shape == stream.shape]
    args = tuple(edit(a.clone()) if any(a is m for m in mine) else a for a in call.args)
    kwargs = {k: edit(v.clone()) if any(v is m for m in mine) else v for k, v in call.kwargs.items()}
    try:
        return stream_out(evidence.module.get_submodule(path)(*args, **kwargs))
    except Exception:
        return None
