"""The claims, in the order in which they are tried: each may rest on what the ones before it proved and learnt."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

from nnterp.certificate._certificate import Certificate, Line
from nnterp.certificate._encoder import encoder_attention, encoder_padding, encoder_states
from nnterp.certificate._evidence import Claimed, Evidence, gather, gather_shapes, is_large, skipped
from nnterp.certificate._filled import filled
from nnterp.certificate._idle_trace import idle_trace
from nnterp.certificate._loops import unrolled
from nnterp.certificate._order import corrected_by_order
from nnterp.certificate._padding import padding
from nnterp.certificate._parts import PARTS, parts
from nnterp.certificate._passes import passes
from nnterp.certificate._readout import readout
from nnterp.certificate._roles import roles
from nnterp.certificate._stream import consecutive, hidden_states
from nnterp.certificate._sum import residual_sum, with_own_scales
from nnterp.certificate._writes import writes
from nnterp.defaults import plain_defaults
from nnterp.devices import input_device
from nnterp.discovery import BETWEEN_PROBE, Probe, Silent, find_between, quiet, silent_weights, sounding
from nnterp.facts import Facts, unproven_facts
from nnterp.huggingface import dtype_of
from nnterp.named_transformer import NamedTransformer
from nnterp.versions import version_of

Claim = Callable[[Evidence, Facts], Claimed]

CLAIMS: tuple[Claim, ...] = (
    parts,
    consecutive,
    hidden_states,
    readout,
    roles,
    residual_sum,
    idle_trace,
    padding,
    writes,
    filled,
)


def claims_of(facts: Facts) -> tuple[Claim, ...]:
    """The claims that are tried for a model: some are about encoders or loops, and come before the padding."""
    at = CLAIMS.index(padding)
    if facts.anatomy.runs:
        return (*CLAIMS[:at], passes, *CLAIMS[at:])
    if facts.encoder is None:
        return CLAIMS
    return (*CLAIMS[:at], encoder_states, encoder_attention, encoder_padding, *CLAIMS[at + 1 :])


@plain_defaults()
def certify(model: NamedTransformer) -> tuple[Certificate, Facts]:
    """Prove a model's names, as far as it can be done with what is loaded. The model is not changed.

    Returns:
        The certificate, failed lines included, and the facts that were learnt up to the first failure.
    """
    started = time.perf_counter()
    declared = None if model.rename_config is None else model.rename_config.attn_prob_source
    facts = unproven_facts(model._module, model.anatomy.rolled(), declared)
    lines, facts = (_with_weights if model.dispatched else _without_weights)(model, facts)
    return stamped(model, facts, lines, started), facts


def stamped(model: NamedTransformer, facts: Facts, lines: list[Line], started: float) -> Certificate:
    """Lines as a certificate of a model; `started` is the time at which the first was begun."""
    return Certificate(
        model=model.repo_id or "",
        revision=model.revision,
        model_class=facts.anatomy.model_class,
        dtype=str(dtype_of(model._module)).removeprefix("torch."),
        device=str(input_device(model._module)) if model.dispatched else "meta",
        versions={name: version_of(name) for name in ("nnterp-core", "nnsight", "transformers", "torch")},
        lines=tuple(lines),
        seconds=time.perf_counter() - started,
    )


def _with_weights(model: NamedTransformer, facts: Facts) -> tuple[list[Line], Facts]:
    """Try the claims; where weights are all zero, with random numbers in their place.

    If a claim then fails, the model is tried as it is, and that is what counts if all claims hold.
    """
    silent = silent_weights(model._module)
    lines, learnt = _tried(model, facts, silent)
    if silent and _failed(lines):
        as_it_is, plain = _tried(model, facts, [])
        if not _failed(as_it_is):
            return as_it_is, plain
    return lines, learnt


def _tried(model: NamedTransformer, facts: Facts, silent: list[Silent]) -> tuple[list[Line], Facts]:
    """Try the claims in order, up to the first that fails. If none does, find the operations that make `layers_mid`."""
    module = model._module
    with quiet(module), sounding(module, silent):
        evidence = gather(model, is_large(module))
        facts = dataclasses.replace(corrected_by_order(evidence, unrolled(evidence, facts)), proof="weights")
        lines: list[Line] = []
        for claim in claims_of(facts):
            line, facts = claim(evidence, facts)
            lines.append(line)
            if line.status == "failed":
                return lines, facts
        probe = Probe(module, facts.anatomy, facts.repeated, BETWEEN_PROBE)
        facts = dataclasses.replace(facts, between=find_between(probe, facts.residual))
    if silent:
        lines[0] = dataclasses.replace(lines[0], detail=f"{lines[0].detail}; {_about(silent)}")
    if any(one.gate for one in silent):
        with quiet(module), sounding(module, [one for one in silent if not one.gate]):
            facts = with_own_scales(gather(model, is_large(module)), facts)
    return lines, facts.searching(module, model.interleaver)


def _failed(lines: list[Line]) -> bool:
    return lines[-1].status == "failed"


def _about(silent: list[Silent]) -> str:
    """What the certificate says of weights that are all zero."""
    names = ", ".join(one.name for one in silent[:3]) + (", ..." if len(silent) > 3 else "")
    return f"{len(silent)} weights are all zero and were proven with random numbers in their place: {names}"


def _without_weights(model: NamedTransformer, facts: Facts) -> tuple[list[Line], Facts]:
    """Shapes and order of the parts, from a forward pass on fake tensors."""
    why = "its weights are not loaded: call model.dispatch()"
    facts = dataclasses.replace(facts, proof="structure", why_unproven=why)
    try:
        evidence = gather_shapes(model, is_large(model._module))
        line, learnt = parts(evidence, corrected_by_order(evidence, unrolled(evidence, facts)))
    except Exception as error:
        reason = f"the model cannot be scanned without weights ({type(error).__name__}: {str(error)[:120]})"
        return [skipped(PARTS, f"{reason}; checked when they are loaded")], facts
    return [line], learnt
