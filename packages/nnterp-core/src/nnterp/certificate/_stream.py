"""Two claims about the residual stream: it runs from layer to layer, and it is HuggingFace's own hidden states."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import torch
from torch import nn

from nnterp.certificate._evidence import REMEDY_LAYERS, Claimed, Evidence, Pair, compared, outcome, skipped
from nnterp.certificate._loops import may_be_seam, read_at_seam
from nnterp.discovery import Call
from nnterp.facts import Facts
from nnterp.tensors import relative_error
from nnterp.wording import generic_path, ranges

CONSECUTIVE = "each layer reads what the layer before it wrote"
HIDDEN = "layers_output equals HuggingFace's hidden states"


def consecutive(evidence: Evidence, facts: Facts) -> Claimed:
    """A layer is given what the one before it returned, or that plus what one module between the two adds.

    Where a pass through looped layers begins or ends, it may be given something else that the model made before. Learns
    the modules that add to the stream between layers, and the layers that read something else.
    """
    recording = evidence.recording
    pairs: list[Pair] = []
    between: list[str] = []
    layers, seams = evidence.ran(facts.anatomy), dict[int, str]()
    for before, after in itertools.pairwise(layers):
        given, made = evidence.of(after).call(after.path), evidence.of(before).call(before.path)
        if given is None or made is None or given.stream_in is None or made.stream_out is None:
            continue
        stream = made.stream_out
        apart = relative_error(stream, given.stream_in) > evidence.tolerance
        if apart and may_be_seam(before, after):
            read = read_at_seam(evidence, layers, after)
            if read is not None:
                seams[after.index] = read
                continue
        elif apart:
            path = _adding_between(evidence, facts, made, given)
            if path is not None:
                between.append(path)
                stream = stream + recording.calls[path][0].stream_out
        pairs.append((f"between {before.path} and {after.path}", given.stream_in, stream))
    detail = f"and what {', '.join(dict.fromkeys(map(generic_path, between)))} adds" if between else ""
    detail = f"and where a pass begins or ends, {_listed(seams)}" if seams else detail
    line = compared(CONSECUTIVE, pairs, evidence.tolerance, REMEDY_LAYERS, detail)
    anatomy = dataclasses.replace(facts.anatomy, between=tuple(between), seams=tuple(seams))
    return line, dataclasses.replace(facts, anatomy=anatomy)


def _listed(seams: dict[int, str]) -> str:
    """What is read at each seam, in words."""
    by_sum: dict[str, list[int]] = {}
    for index, read in seams.items():
        by_sum.setdefault(read, []).append(index)
    return "; ".join(f"multiples of {read} (layers {ranges(indices)})" for read, indices in by_sum.items())


def _adding_between(evidence: Evidence, facts: Facts, before: Call, after: Call) -> str | None:
    """The module outside of all layers whose output, added to what a layer returned, is what the next is given.

    A layer that is missing in the list is no such module, nor is anything inside it.
    """
    kinds = tuple({type(evidence.module.get_submodule(layer.path)) for layer in facts.anatomy.blocks})
    stream, goal = before.stream_out, after.stream_in
    assert stream is not None
    assert goal is not None
    for path, calls in evidence.recording.calls.items():
        call, made = calls[0], calls[0].stream_out
        if len(calls) > 1 or made is None or not before.ended < call.began < call.ended < after.began:
            continue
        if made.shape != goal.shape or any(isinstance(m, kinds) for m in _holders(evidence.module, path)):
            continue
        if relative_error(stream + made, goal) <= evidence.tolerance:
            return path
    return None


def _holders(root: nn.Module, path: str) -> Iterator[nn.Module]:
    """A module and all those that hold it."""
    while path:
        yield root.get_submodule(path)
        path = path.rpartition(".")[0]


def hidden_states(evidence: Evidence, facts: Facts) -> Claimed:
    """What leaves each layer is HuggingFace's hidden state after it. Learns nothing."""
    layers = evidence.ran(facts.anatomy)
    result = evidence.recording.result
    encoded = facts.anatomy.encoder is not None
    hidden = getattr(result, "decoder_hidden_states" if encoded else "hidden_states", None)
    if hidden is None:
        return skipped(HIDDEN, "the model does not return hidden states"), facts
    several = bool(facts.anatomy.other_stacks)
    if several:  # HuggingFace returns those of several stacks, in the order in which they run
        hidden = hidden[-len(layers) :]
    if len(hidden) not in (len(layers), len(layers) + 1):
        detail = f"HuggingFace returns {len(hidden)} of them for {len(layers)} layers"
        return outcome(HIDDEN, False, detail=detail, remedy=REMEDY_LAYERS), facts
    own = _after_layers(evidence, facts, hidden)
    pairs: list[Pair] = []
    for layer, state in zip(layers, own, strict=False):
        made = evidence.of(layer).made(layer.path)
        if made is None:
            continue
        made = evidence.main_stream(facts, made) if made.shape[1] != state.shape[1] else made
        if layer is layers[-1]:  # HuggingFace returns the last one normalised, or not, by model
            merged = made.dim() > 3
            made = min(_last_states(evidence, facts, made), key=lambda c: relative_error(c, state))
            if merged and relative_error(made, state) > evidence.tolerance:
                continue  # several streams are merged after the last layer; the readout's line covers it
        pairs.append((layer.path, made, state))
    streams = facts.readout.layout.streams
    detail = f"the first of {streams} streams" if streams > 1 else ""
    detail = "the last of those it returns" if several else detail
    return compared(HIDDEN, pairs, evidence.tolerance, REMEDY_LAYERS, detail), facts


def _after_layers(evidence: Evidence, facts: Facts, hidden: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """HuggingFace's hidden states after each layer.

    Most models' begin with the embeddings, some (Mamba, RWKV) with what leaves the first layer.
    """
    layers = evidence.ran(facts.anatomy)
    entering = evidence.recording.given(layers[0].path)
    start = None if entering is None else evidence.main_stream(facts, entering)
    begins_with_input = start is not None and relative_error(start, hidden[0]) <= evidence.tolerance
    return hidden[1:] if begins_with_input else hidden[: len(layers)]


def _last_states(evidence: Evidence, facts: Facts, made: torch.Tensor) -> list[torch.Tensor]:
    """What HuggingFace may call the last hidden state."""
    norm, head = evidence.last_call(facts.anatomy.ln_final), evidence.last_call(facts.anatomy.lm_head)
    later = [norm.stream_out if norm is not None else None, head.stream_in if head is not None else None]
    return [made, *(state for state in later if state is not None)]
