"""Claim: every part ran, as often and in the order that its name says, on tensors of the stream's shape."""

from __future__ import annotations

import dataclasses

import torch

from nnterp.anatomy import Anatomy, Part
from nnterp.certificate._evidence import REMEDY_ALL, Claimed, Evidence, outcome, shape_of
from nnterp.certificate._returns import returns_of
from nnterp.discovery import Call
from nnterp.facts import Facts
from nnterp.record import replace
from nnterp.table import Side
from nnterp.traced import StreamLayout

PARTS = "parts found, run once and in order, with the stream's shape"


def parts(evidence: Evidence, facts: Facts) -> Claimed:
    """Learns the stream's layout, where tensors are stored in it, what layers return, what runs repeatedly, and the
    width of the logits."""
    anatomy, recording = facts.anatomy, evidence.recording
    layers = evidence.ran(anatomy)
    first = recording.call(layers[0].path)
    stream = None if first is None else first.stream_out
    wrong = _layer_problems(evidence, anatomy, stream)
    impossible: list[str] = []
    if first is not None and stream is not None:
        layout = StreamLayout.of(stream.shape, batch=1, seq=evidence.length)
        impossible += [*_two_streams(first), *_layout_problems(evidence, anatomy, stream, layout)]
        if layout is not None:
            facts = dataclasses.replace(facts, readout=replace(facts.readout, layout=layout))
    wrong = impossible or [*wrong, *_ends_problems(evidence, anatomy)]
    remedy = "nnterp cannot serve such a model" if impossible else REMEDY_ALL
    detail = "; ".join(wrong[:3]) if wrong else _description(evidence, facts)
    line = outcome(PARTS, not wrong, detail=detail, remedy=remedy)
    return line, facts if wrong else _learnt(evidence, facts)


def _description(evidence: Evidence, facts: Facts) -> str:
    idle, layout = evidence.idle(facts.anatomy), facts.readout.layout
    anatomy = facts.anatomy
    detail = f"{anatomy.num_layers} layers" + (f", of which {idle} run only with an image" if idle else "")
    if anatomy.runs:
        detail = f"{len(anatomy.runs)} layers, run {anatomy.num_layers} times in all"
    if layout.stored is not None:
        detail += f"; the stream is stored as {layout.stored.name.replace('streams', str(layout.streams))}"
    return detail


def _learnt(evidence: Evidence, facts: Facts) -> Facts:
    calls = evidence.recording.calls
    stored: set[tuple[str, Side]] = set()
    for path, (first, *_) in calls.items():
        edges: tuple[tuple[Side, torch.Tensor | None], ...] = (("input", first.stream_in), ("output", first.stream_out))
        stored |= {(path, side) for side, x in edges if x is not None and evidence.is_stored(facts, x)}
    width = evidence.recording.result.logits.shape[-1]
    sizes = dataclasses.replace(facts.anatomy.sizes, vocab_size=width)
    return dataclasses.replace(
        facts,
        anatomy=dataclasses.replace(facts.anatomy, sizes=sizes),
        only_with_image=tuple(evidence.idle(facts.anatomy)),
        repeated={path: len(each) for path, each in calls.items() if len(each) > 1},
        stored_as_stream=frozenset(stored),
        edited_later=frozenset(evidence.recording.edited),
        readout=replace(facts.readout, returns=returns_of(evidence, facts.anatomy)),
    )


def _layer_problems(evidence: Evidence, anatomy: Anatomy, stream: torch.Tensor | None) -> list[str]:
    """What is wrong with the layers and their parts, given what the first layer returns."""
    wrong: list[str] = []
    previous = 0
    for layer in evidence.ran(anatomy):
        calls = evidence.recording.calls.get(layer.path, [])
        if len(calls) != layer.turns:
            wrong.append(f"{layer.path} ran {len(calls)} times in one forward pass")
            continue
        call = calls[layer.turn]
        if call.began < previous:
            wrong.append(f"{layer.path} ran before the layer that precedes it")
        previous = call.ended
        out = call.stream_out
        if out is None or stream is None or out.shape != stream.shape:
            wrong.append(f"{layer.path} returns {shape_of(out)} where the first layer returns {shape_of(stream)}")
        for role in ("self_attn", "mixer", "mlp"):
            part = getattr(layer, role)
            if part is not None and not (role == "mixer" and part == layer.self_attn):
                wrong += _part_problems(evidence, anatomy, call, role, part)
    return wrong


def _part_problems(evidence: Evidence, anatomy: Anatomy, layer: Call, role: str, part: Part) -> list[str]:
    for path in dict.fromkeys((part.entry, part.exit)):
        if not evidence.recording.calls.get(path):
            return [f"{role} ({path}) did not run"]
        if evidence.recording.within(path, layer) is None:
            return [f"{role} ({path}) ran outside its layer"]
    call = evidence.recording.within(part.exit, layer)
    out = None if call is None else call.stream_out
    stream = layer.stream_out
    # A layer may carry several streams (hyper-connections), stacked or side by side; its parts return one.
    widths = {anatomy.sizes.hidden_size, None if stream is None else stream.shape[-1]}
    if out is None or out.shape[-1] not in widths:
        return [f"{role} ({part.exit}) returns {shape_of(out)}, the layer {shape_of(stream)}"]
    return []


def _layout_problems(
    evidence: Evidence, anatomy: Anatomy, stream: torch.Tensor, layout: StreamLayout | None
) -> list[str]:
    if layout is None:
        return [
            f"layers carry {shape_of(stream)} for an input of [1, {evidence.length}]: no axes of it are batch and "
            "sequence"
        ]
    width = anatomy.sizes.hidden_size
    if width is not None and stream.shape[-1] % width:
        return [f"layers return {shape_of(stream)}, but the config's hidden size is {width}"]
    return []


def _two_streams(layer: Call) -> list[str]:
    """A reversible layer takes and returns two streams, so neither alone is the residual stream."""
    out, result = layer.stream_out, layer.output
    if out is None or not isinstance(result, (tuple, list)):
        return []
    given = [a for a in (*layer.args, *layer.kwargs.values()) if isinstance(a, torch.Tensor) and a.shape == out.shape]
    made = [a for a in result if isinstance(a, torch.Tensor) and a.shape == out.shape]
    if len(given) > 1 and len(made) > 1:
        return ["layers take and return two streams (reversible residuals), so no one tensor is the residual stream"]
    return []


def _ends_problems(evidence: Evidence, anatomy: Anatomy) -> list[str]:
    """What is wrong with the embedding, the final norm and the head, and with when they ran."""
    wrong = []
    for role in ("embed_tokens", "ln_final", "lm_head"):
        path = getattr(anatomy, role)
        if path is not None and not evidence.recording.calls.get(path):
            wrong.append(f"{role} ({path}) did not run")
    first = evidence.recording.call(anatomy.blocks[0].path)
    embed = None if anatomy.embed_tokens is None else evidence.recording.call(anatomy.embed_tokens)
    if first and embed and embed.began > first.began:
        wrong.append(f"embed_tokens ({anatomy.embed_tokens}) ran after the first layer began")
    ended = max((c.ended for b in evidence.ran(anatomy) for c in evidence.recording.calls.get(b.path, [])), default=0)
    for role in ("ln_final", "lm_head"):
        path = getattr(anatomy, role)
        call = evidence.last_call(path)
        if call is not None and call.began < ended:
            wrong.append(f"{role} ({path}) ran before the last layer ended")
    return wrong
