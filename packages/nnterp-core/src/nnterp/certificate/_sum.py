"""Claim: what enters a layer plus what its parts contribute is what leaves it."""

from __future__ import annotations

import dataclasses

import torch

from nnterp.anatomy import Anatomy, Layer, Part
from nnterp.certificate._evidence import REMEDY_PARTS, Claimed, Evidence, outcome, skipped
from nnterp.certificate._order import update_parts
from nnterp.discovery import Call, Recording, ResidualStructure, record, refit, solve_residual
from nnterp.facts import Facts
from nnterp.tensors import relative_error

IDENTITY = "input + contributions == output"


def residual_sum(evidence: Evidence, facts: Facts) -> Claimed:
    """Learns how each layer combines its parts, and where parts leave that add the stream by themselves."""
    anatomy, exits = _with_exits_inside(evidence, facts.anatomy)
    structures = tuple(
        solve_residual(
            layer,
            evidence.of(layer),
            [path for path in evidence.recording.calls if path.startswith(f"{layer.path}.")],
            evidence.tolerance,
            exits,
        )
        for layer in anatomy.blocks
    )
    facts = dataclasses.replace(facts, anatomy=anatomy, residual=structures)
    wrong = _named_parts_that_do_not_read_the_stream(evidence, anatomy, structures)
    if wrong:
        return outcome(IDENTITY, False, detail="; ".join(wrong[:2]), remedy=REMEDY_PARTS), facts
    idle = evidence.idle(anatomy)
    solved = {i: s for i, s in enumerate(structures) if i not in idle}
    unknown = {i: s for i, s in solved.items() if s.kind == "unknown"}
    if not unknown:
        error = max((s.error or 0.0 for s in structures), default=0.0)
        kinds = ", ".join(sorted({s.kind for s in solved.values()}))
        return outcome(IDENTITY, True, error, evidence.tolerance, kinds), facts
    index, first = next(iter(unknown.items()))
    detail = f"layers {', '.join(map(str, [*unknown][:6]))}: {first.reason}"
    if evidence.named("attn_name", "mlp_name") or not _holds_more(evidence, anatomy, anatomy.blocks[index]):
        return outcome(IDENTITY, False, first.error, evidence.tolerance, detail, REMEDY_PARTS), facts
    return skipped(IDENTITY, f"{detail}; contributions are unavailable there"), facts


def with_own_scales(evidence: Evidence, facts: Facts) -> Facts:
    """The facts with the factors of the parts as they are in this recording.

    Used where factors that are zero were proven with random numbers in their place: which parts add to the stream is
    known then, and what they are multiplied by is zero.
    """
    structures = []
    for layer, structure in zip(facts.anatomy.blocks, facts.residual, strict=True):
        call = evidence.of(layer).call(layer.path)
        if call is None or structure.kind == "unknown":
            structures.append(structure)
            continue
        inside = [path for path in evidence.recording.calls if path.startswith(f"{layer.path}.")]
        structures.append(refit(structure, call, evidence.recording, inside, evidence.tolerance))
    return dataclasses.replace(facts, residual=tuple(structures))


def _with_exits_inside(evidence: Evidence, anatomy: Anatomy) -> tuple[Anatomy, dict[str, Call]]:
    """Find where parts leave whose module adds the stream by itself and normalises it before it returns.

    It is the operation whose output, added to what the part is given, is what the closing norm is given.

    Returns:
        The anatomy with these operations, and what was made there as calls, by `Part.end`.
    """
    parts = [p for b in evidence.ran(anatomy) for p in (b.mixer, b.self_attn) if p is not None and p.closing]
    if not parts:
        return anatomy, {}
    ids = evidence.probe_ids(1, evidence.length)
    exits = list(dict.fromkeys(part.exit for part in parts))
    operations = record(evidence.module, lambda: evidence.forward(ids), operations=exits, arguments=False)
    found = {part.exit: pair for part in parts if (pair := _exit_inside(evidence, operations, part)) is not None}
    anatomy = update_parts(anatomy, lambda part: found[part.exit][0] if part.exit in found else part)
    return anatomy, {part.end: call for part, call in found.values()}


def _exit_inside(evidence: Evidence, operations: Recording, part: Part) -> tuple[Part, Call] | None:
    recording = evidence.recording
    closing = recording.call(part.closing or "")
    x, mid = recording.given(part.exit), None if closing is None else closing.stream_in
    if closing is None or x is None or mid is None or len(recording.calls[part.exit]) > 1:
        return None
    for operation in sorted(operations.operations_of(part.exit), key=lambda o: -o.ended):
        made = operation.output
        if operation.times > 1 or not isinstance(made, torch.Tensor) or made.shape != x.shape:
            continue
        if relative_error(x + made, mid) <= evidence.tolerance:
            call = Call((), {}, made, closing.began - 1, closing.began)
            return dataclasses.replace(part, leaves=operation.labels), call
    return None


def _named_parts_that_do_not_read_the_stream(
    evidence: Evidence, anatomy: Anatomy, structures: tuple[ResidualStructure, ...]
) -> list[str]:
    """Parts that the user named and that are given neither the stream nor a norm of it.

    The last projection of an MLP returns what the MLP returns, but it is given something else.
    """
    config = evidence.model.rename_config
    names = (("self_attn", "attn_name"), ("mlp", "mlp_name"))
    roles = [role for role, name in names if config is not None and getattr(config, name)]
    wrong = []
    for layer, structure in zip(anatomy.blocks, structures, strict=True) if roles else ():
        call = evidence.of(layer).call(layer.path)
        if call is None:
            continue
        sources = _streams_in(evidence, call, structure)
        for role in roles:
            part = getattr(layer, role)
            entered = None if part is None else evidence.recording.within(part.entry, call)
            if entered is None or entered.stream_in is None:
                continue
            given = entered.stream_in.flatten()
            if not any(s.numel() == given.numel() and torch.equal(s.flatten(), given) for s in sources):
                wrong.append(f"{part.entry} is not given the residual stream, nor a norm of it")
    return wrong


def _streams_in(evidence: Evidence, layer: Call, structure: ResidualStructure) -> list[torch.Tensor]:
    """The stream in one layer, as it enters, between the parts, and after each norm."""
    within = evidence.recording.within
    sources = [layer.stream_in]
    if structure.mid is not None and (mid := within(structure.mid, layer)) is not None:
        sources.append(mid.stream_in if structure.mid_side == "input" else mid.stream_out)
    sources += [own.stream_out for path in evidence.norms() if (own := within(path, layer)) is not None]
    return [source for source in sources if source is not None]


def _holds_more(evidence: Evidence, anatomy: Anatomy, layer: Layer) -> bool:
    """Whether a layer holds more than parts and norms, or several streams: then no simple sum is expected."""
    call = evidence.recording.call(layer.path)
    x, y = (None, None) if call is None else (call.stream_in, call.stream_out)
    if (
        layer.cross_attn is not None
        or x is None
        or y is None
        or x.shape != y.shape
        or y.dim() > 3
        or y.shape[-1] != anatomy.sizes.hidden_size
    ):
        return True
    module = evidence.module.get_submodule(layer.path)
    known = [p.path or p.entry for p in (layer.mixer, layer.self_attn, layer.mlp) if p is not None]
    for name, child in module.named_children():
        path = f"{layer.path}.{name}"
        inside = any(k == path or k.startswith(f"{path}.") for k in known)
        if not inside and "norm" not in type(child).__name__.lower() and next(child.parameters(), None) is not None:
            return True
    return next(module.parameters(recurse=False), None) is not None
