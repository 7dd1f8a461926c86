"""Claims about the vision tower and the projector, tried on a prompt with an image."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import nnsight
import torch
from torch import nn

from nnterp.certificate._evidence import Claimed, Evidence, outcome, skipped
from nnterp.discovery import Vision, attention_of, vision_stacks
from nnterp.facts import Facts
from nnterp.huggingface import uncached
from nnterp.table import Label, get_label
from nnterp.tensors import is_multiple, relative_error, stream_in
from nnterp.traced import read_value, write_value

TOWER = "each layer of the vision tower reads what the one before it wrote, and every write equals a torch hook's"
FEATURES = "image_features is what enters the stream at the image's tokens, and a write equals a torch hook's"
EFFECT = 1e-6

_Target = tuple[Label, int | None]  # a value, and the layer of the tower


def tower(evidence: Evidence, facts: Facts) -> Claimed:
    """Learns the layers of the tower and their attentions: of several stacks the last that reaches the logits."""
    assert facts.vision is not None
    reasons: list[str] = []
    for layers in _in_turn(evidence, facts):
        problem = _chain_problem(evidence, layers)
        if problem:
            reasons.append(problem)
            continue
        attentions = tuple(f"{path}.{attention_of(evidence.module.get_submodule(path))}" for path in layers)
        if not all(_attends(evidence, layer, own) for layer, own in zip(layers, attentions, strict=True)):
            attentions = ()
        missing = {} if attentions else {"vision_attentions_output": "its attention returns no tensor of the stream"}
        learnt = dataclasses.replace(facts.vision, layers=layers, attentions=attentions, reasons=missing)
        trial = dataclasses.replace(facts, vision=learnt)
        names = ("vision_layers_input", "vision_layers_output", *(("vision_attentions_output",) if attentions else ()))
        targets: list[_Target] = [
            (get_label(name), layer) for layer in range(len(layers)) for name in sorted(names, key=_rank)
        ]
        if _silent(evidence, trial, targets[0]):
            reasons.append(f"{layers[0].rpartition('.')[0]} does not reach the logits")
            continue
        error, problem = _written(evidence, trial, targets)
        detail = f"{len(layers)} layers, {layers[0].rpartition('.')[0]}"
        if not problem and _silent(evidence, trial, targets[-1]):
            detail += "; what leaves the last of them does not reach the logits"
        return outcome(TOWER, not problem, error, evidence.tolerance, problem or detail), facts if problem else trial
    reason = "; ".join(reasons[:2]) or "no list of layers with attention was found beside the language model"
    names = ("vision_layers_input", "vision_attentions_output", "vision_layers_output")
    vision = dataclasses.replace(facts.vision, reasons=dict.fromkeys(names, reason))
    return skipped(TOWER, reason), dataclasses.replace(facts, vision=vision)


def _rank(name: str) -> int:
    return ("vision_layers_input", "vision_attentions_output", "vision_layers_output").index(name)


def features(evidence: Evidence, facts: Facts) -> Claimed:
    """Learns the projector: the last module that returns, up to a factor, what stands at the image's tokens."""
    assert facts.vision is not None
    reason = _no_projector(evidence, facts)
    if reason is None:
        for path in _projectors(evidence, facts):
            trial = dataclasses.replace(facts, vision=dataclasses.replace(facts.vision, projector=path))
            target = (get_label("image_features"), None)
            error, problem = _written(evidence, trial, [target])
            if not problem and not _silent(evidence, trial, target):
                return outcome(FEATURES, True, error, evidence.tolerance, path), trial
        reason = "no module returns what stands at the image's tokens"
    vision = dataclasses.replace(facts.vision, reasons={**facts.vision.reasons, "image_features": reason})
    return skipped(FEATURES, reason), dataclasses.replace(facts, vision=vision)


def _in_turn(evidence: Evidence, facts: Facts) -> Iterator[tuple[str, ...]]:
    """The stacks that ran: the one that ran last first, because what it returns is nearest to the language model."""
    calls = evidence.recording.calls
    ran = [s for s in vision_stacks(evidence.module, facts.anatomy) if calls.get(s[0])]
    yield from sorted(ran, key=lambda stack: -len(stack))


def _chain_problem(evidence: Evidence, layers: tuple[str, ...]) -> str:
    """Why these are no stack of layers of which each reads what the one before wrote; "" if they are."""
    recording = evidence.recording
    for path in layers:
        number = len(recording.calls.get(path, ()))
        if number != 1:
            return f"{path} ran {number} times in one forward pass"
        if recording.made(path) is None or recording.given(path) is None:
            return f"{path} is not given a tensor, or returns none"
    for before, after in itertools.pairwise(layers):
        made, given = recording.made(before), recording.given(after)
        assert made is not None
        assert given is not None
        error = relative_error(given, made)
        if not error <= evidence.tolerance:
            return f"{after} is not given what {before} returns"
    return ""


def _attends(evidence: Evidence, layer: str, attention: str) -> bool:
    """Whether an attention ran once and returned a tensor of the stream's shape."""
    calls, stream = evidence.recording.calls.get(attention, ()), evidence.recording.made(layer)
    made = calls[0].stream_out if len(calls) == 1 else None
    return made is not None and stream is not None and made.shape == stream.shape


def _no_projector(evidence: Evidence, facts: Facts) -> str | None:
    if facts.vision is None or not facts.vision.tokens:
        return "the language model attends to the image, and no token of the stream stands for it"
    return None


def _projectors(evidence: Evidence, facts: Facts) -> Iterator[str]:
    """Modules outside of all layers that return what stands at the image's tokens in the stream, latest first."""
    assert facts.vision is not None
    entering = evidence.recording.given(facts.anatomy.blocks[0].path)
    assert entering is not None
    keep = torch.tensor([token in facts.vision.tokens for token in evidence.ids[0].tolist()])
    goal = evidence.own_positions(facts, entering)[0]
    goal = (goal[:, 0] if goal.dim() > 2 else goal)[keep]
    layers = tuple(f"{path}." for path in (*(b.path for b in facts.anatomy.blocks), *facts.vision.layers))
    calls = sorted(evidence.recording.calls.items(), key=lambda entry: -entry[1][0].ended)
    for path, each in calls:
        made = each[0].stream_out
        if len(each) > 1 or made is None or f"{path}.".startswith(layers) or made.numel() != goal.numel():
            continue
        if is_multiple(made.reshape(goal.shape), goal, evidence.tolerance):
            yield path


# -- written in two ways -----------------------------------------------------------------------------------------------


def _silent(evidence: Evidence, facts: Facts, target: _Target) -> bool:
    """Whether a value, written alone, leaves the logits as they were."""
    return not relative_error(_by_hooks(evidence, facts, [target]), evidence.recording.result.logits) > EFFECT


def _written(evidence: Evidence, facts: Facts, targets: list[_Target]) -> tuple[float | None, str]:
    """Read values by accessors and compare with what was recorded; write them by accessors and by hooks, in one run.

    Returns:
        How far the two runs' logits are apart, None if it came to none; and what is wrong, "" if nothing is.
    """
    model = evidence.model.supposing(facts)
    given = {**evidence.inputs(evidence.ids), **uncached(evidence.module)}
    try:
        with model.trace(given):
            found = nnsight.save([read_value(model, label, layer).clone() for label, layer in targets])
        with model.trace(given):
            for seed, (label, layer) in enumerate(targets):
                write_value(model, label, _noisy(read_value(model, label, layer), seed), layer)
            logits = model.logits.save()
    except Exception as problem:
        return None, f"{type(problem).__name__}: {str(problem)[:150]}"
    for (label, layer), tensor in zip(targets, found, strict=True):
        path, side = _edge(facts.vision, label.name, layer)
        recorded = (evidence.recording.given if side == "input" else evidence.recording.made)(path)
        if recorded is None or not relative_error(tensor, recorded) <= evidence.tolerance:
            return None, f"{label.name} of layer {layer} is not what was recorded"
    error = relative_error(logits, _by_hooks(evidence, facts, targets))
    return error, "" if error <= evidence.tolerance else "a write is not what a hook does"


def _by_hooks(evidence: Evidence, facts: Facts, targets: list[_Target]) -> torch.Tensor:
    """The reference: plain forward hooks on the plain module."""
    handles: list[Any] = []
    try:
        for seed, (label, layer) in enumerate(targets):
            path, side = _edge(facts.vision, label.name, layer)
            handles.append(_hook(evidence.module.get_submodule(path), side, seed))
        return evidence.forward(evidence.ids).logits
    finally:
        for handle in handles:
            handle.remove()


def _edge(vision: Vision | None, name: str, layer: int | None) -> tuple[str, str]:
    assert vision is not None
    if layer is None:
        assert vision.projector is not None
        return vision.projector, "output"
    path = (vision.attentions if "attentions" in name else vision.layers)[layer]
    return path, "input" if name.endswith("input") else "output"


def _hook(module: nn.Module, side: str, seed: int) -> Any:
    def on_output(_: Any, args: tuple, output: Any) -> Any:
        if isinstance(output, torch.Tensor):
            return _noisy(output, seed)
        return type(output)((_noisy(output[0], seed), *output[1:]))

    def on_input(_: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        stream = stream_in(args, kwargs)
        if stream is None:
            return None
        new = _noisy(stream, seed)
        return tuple(new if a is stream else a for a in args), {k: new if v is stream else v for k, v in kwargs.items()}

    if side == "output":
        return module.register_forward_hook(on_output, prepend=True)  # before HuggingFace keeps hidden states
    return module.register_forward_pre_hook(on_input, with_kwargs=True)


def _noisy(tensor: torch.Tensor, seed: int) -> torch.Tensor:
    """A tensor shifted by a fixed random direction, as large as a third of its numbers."""
    direction = torch.randn(tensor.shape[-1], generator=torch.Generator().manual_seed(seed))
    size = 0.3 * tensor.float().pow(2).mean().sqrt().clamp(min=1e-3)
    return tensor + (direction.to(tensor.device) * size).to(tensor.dtype)
