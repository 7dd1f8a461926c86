"""Claims about encoder-decoder models: the encoder's stream, attention in and to the encoder, and padding of both."""

from __future__ import annotations

import dataclasses

import torch

from nnterp.certificate._certificate import Line
from nnterp.certificate._evidence import REMEDY_LAYERS, Claimed, Evidence, Pair, compared, outcome, skipped
from nnterp.certificate._padding import PADDING, PADDING_SLACK
from nnterp.discovery import solve_residual
from nnterp.eager import is_eager
from nnterp.errors import Unavailable
from nnterp.facts import Facts
from nnterp.huggingface import uncached
from nnterp.named_transformer import NamedTransformer
from nnterp.table import get_label
from nnterp.tensors import relative_error
from nnterp.traced import Sharing, read_value

ENCODER = "encoder_layers_output equals HuggingFace's encoder hidden states"
ATTENDED = "attention in the encoder and to it equals HuggingFace's"


def encoder_states(evidence: Evidence, facts: Facts) -> Claimed:
    """What leaves each layer of the encoder is HuggingFace's hidden state after it, in one pass of each.

    Learns how each of its layers combines its parts.
    """
    assert facts.encoder is not None
    anatomy, recording = facts.encoder.anatomy, evidence.recording
    for layer in anatomy.blocks:
        if (times := len(recording.calls.get(layer.path, ()))) != 1:
            return outcome(ENCODER, False, detail=f"{layer.path} ran {times} times", remedy=REMEDY_LAYERS), facts
        for part in (layer.self_attn, layer.mlp):
            if part is not None and not recording.calls.get(part.exit):
                return outcome(ENCODER, False, detail=f"{part} did not run", remedy=REMEDY_LAYERS), facts
    hidden = getattr(recording.result, "encoder_hidden_states", None)
    if hidden is None:
        return skipped(ENCODER, "the model does not return hidden states of its encoder"), facts
    layers = anatomy.blocks
    if len(hidden) != len(layers) + 1:
        detail = f"HuggingFace returns {len(hidden)} of them for {len(layers)} layers"
        return outcome(ENCODER, False, detail=detail, remedy=REMEDY_LAYERS), facts
    pairs: list[Pair] = []
    for layer, state in zip(layers, hidden[1:], strict=True):
        made = recording.made(layer.path)
        if made is None:
            return outcome(ENCODER, False, detail=f"{layer.path} returns no tensor", remedy=REMEDY_LAYERS), facts
        if layer is layers[-1]:  # HuggingFace returns the last one normalised, or not, by model
            norms = [call for path in evidence.norms() for call in recording.calls[path]]
            fed = [n.stream_out for n in norms if n.stream_in is not None and torch.equal(n.stream_in, made)]
            made = min([made, *(one for one in fed if one is not None)], key=lambda one: relative_error(one, state))
        pairs.append((layer.path, made, state))
    structures = tuple(
        solve_residual(
            layer,
            recording,
            [path for path in recording.calls if path.startswith(f"{layer.path}.")],
            evidence.tolerance,
        )
        for layer in layers
    )
    facts = dataclasses.replace(facts, encoder=dataclasses.replace(facts.encoder, residual=structures))
    return compared(ENCODER, pairs, evidence.tolerance, REMEDY_LAYERS), facts


def encoder_attention(evidence: Evidence, facts: Facts) -> Claimed:
    """Probabilities in the encoder and of the decoder to it, as nnterp reads them and as HuggingFace returns them.

    Learns nothing.
    """
    if facts.cross is None:
        return skipped(ATTENDED, "its decoder's layers have no attention to the encoder of their own"), facts
    if not is_eager(evidence.module):
        return skipped(ATTENDED, "probabilities are only there with enable_attention_probs=True"), facts
    inputs = evidence.inputs(evidence.ids)
    result = evidence.module(**inputs, output_attentions=True, **uncached(evidence.module))
    learnt = facts.searching(evidence.module, evidence.model.interleaver)
    model = evidence.model.supposing(learnt)
    asked: list[tuple[str, int, torch.Tensor]] = []
    for name, returned in (
        ("encoder_attention_probabilities", getattr(result, "encoder_attentions", None)),
        ("cross_attention_probabilities", getattr(result, "cross_attentions", None)),
    ):
        for layer, expected in enumerate(returned or ()):
            try:
                model.place(name, layer)
            except Unavailable:
                continue
            if isinstance(expected, torch.Tensor):
                asked.append((name, layer, expected))
    if not asked:
        return skipped(ATTENDED, "HuggingFace returns none, or no layer has them"), facts
    read = _read(model, inputs, [(name, layer) for name, layer, _ in asked])
    pairs = [(f"{name}[{layer}]", made, expected) for (name, layer, expected), made in zip(asked, read, strict=True)]
    return compared(ATTENDED, pairs, evidence.tolerance, "report it", f"{len(pairs)} attentions"), facts


def _read(model: NamedTransformer, inputs: dict[str, torch.Tensor], keys: list[tuple[str, int]]) -> list[torch.Tensor]:
    """Values in one traced forward pass, in the order of `keys`, which is the order in which they are computed."""
    labels = [(get_label(name), layer) for name, layer in keys]
    with torch.no_grad(), model.trace(inputs):
        found = []
        for label, layer in labels:
            found.append(read_value(model, label, layer))
        found.save()  # type: ignore[attr-defined]  # every object has it in a trace
    return found


def encoder_padding(evidence: Evidence, facts: Facts) -> Claimed:
    """A row whose two inputs are padded on the right gives what it gives alone, or padding is refused.

    Learns whether padding is exact.
    """
    exact = dataclasses.replace(facts, padding="exact", positions_from_mask=False)
    inexact = dataclasses.replace(facts, padding="inexact", positions_from_mask=False)
    if facts.thresholds != Sharing():
        return skipped(PADDING, "its rows may share a batch only up to some length; padding is refused"), inexact
    alone, together, short = _padded_and_alone(evidence, facts)
    model, tolerance = evidence.model.supposing(exact), PADDING_SLACK * evidence.tolerance
    try:
        with torch.no_grad(), model.trace(together):
            logits = model.logits.save()
        error = relative_error(logits[1:, :short], evidence.module(**alone, **uncached(evidence.module)).logits)
    except Exception as failure:
        reason = f"the model does not run on one ({type(failure).__name__}: {str(failure)[:80]})"
        return skipped(PADDING, f"{reason}; padding is refused, prompts of equal length share a batch"), inexact
    if error > tolerance:
        reason = f"HuggingFace's own forward is off by {error:.1e} under right padding"
        return skipped(PADDING, f"{reason}; padding is refused, prompts of equal length share a batch"), inexact
    return Line(PADDING, "passed", error, tolerance, "right padding of both inputs"), exact


def _padded_and_alone(evidence: Evidence, facts: Facts) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], int]:
    """One row alone, the same row behind a longer one in a batch padded on the right, and the row's tokens."""
    short, pads = evidence.length, evidence.pads
    ids = evidence.probe_ids(2, short + pads, seed=1)
    inputs = evidence.inputs(ids)
    filler = getattr(evidence.model.tokenizer, "pad_token_id", None) or 0
    together = {**inputs, "decoder_attention_mask": _mask(ids, short)}
    alone = {name: x[1:].clone() for name, x in inputs.items()}
    alone["decoder_input_ids"] = alone["decoder_input_ids"][:, :short]
    if "input_ids" in inputs:
        heard = inputs["input_ids"].clone()
        less = heard.shape[1] - pads
        together["input_ids"], together["attention_mask"] = heard, _mask(heard, less)
        alone["input_ids"] = heard[1:, :less].clone()
        heard[1, less:] = filler
    together["decoder_input_ids"] = ids.clone()
    together["decoder_input_ids"][1, short:] = filler
    return alone, together, short


def _mask(ids: torch.Tensor, kept: int) -> torch.Tensor:
    mask = torch.ones_like(ids)
    mask[1, kept:] = 0
    return mask
