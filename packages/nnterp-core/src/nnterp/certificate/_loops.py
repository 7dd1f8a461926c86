"""Layers that run several times: their order, and what each pass begins with."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import torch

from nnterp.anatomy import Layer
from nnterp.certificate._evidence import Evidence
from nnterp.discovery import Call, fit
from nnterp.facts import Facts
from nnterp.record import replace
from nnterp.wording import generic_path

MOST = 24  # tensors of which pairs are tried


def unrolled(evidence: Evidence, facts: Facts) -> Facts:
    """The facts with one layer for each run of a layer module, in the order in which they ran.

    Facts of models whose layers run once stay as they are.
    """
    anatomy, calls = facts.anatomy, evidence.recording.calls
    if all(len(calls.get(layer.path, ())) < 2 for layer in anatomy.blocks):
        return facts
    runs = [
        (call.began, layer, turn) for layer in anatomy.blocks for turn, call in enumerate(calls.get(layer.path, ()))
    ]
    runs.sort(key=lambda run: run[0])
    blocks = tuple(
        dataclasses.replace(layer, index=index, turn=turn, turns=len(calls[layer.path]))
        for index, (_, layer, turn) in enumerate(runs)
    )
    anatomy = dataclasses.replace(anatomy, blocks=blocks)
    readout = replace(facts.readout, layer_paths=tuple(layer.path for layer in blocks))
    found = dict(enumerate(anatomy.runs))
    lenders = [
        (index, [i for borrower in borrowers for i in found[borrower] if i > index], what)
        for lender, borrowers, what in facts.lenders
        for index in found[lender]
    ]
    return dataclasses.replace(facts, anatomy=anatomy, readout=readout, lenders=lenders)


def may_be_seam(before: Layer, after: Layer) -> bool:
    """Whether a pass may begin or end between two layers, so that the model's own code stands between them."""
    if before.turns == after.turns == 1:
        return False
    lists = {layer.path.rpartition(".")[0] for layer in (before, after)}
    return after.number != before.number + 1 or before.turns != after.turns or len(lists) > 1


def read_at_seam(evidence: Evidence, layers: list[Layer], after: Layer) -> str | None:
    """What a layer reads where a pass begins, if it is a multiple of one tensor or of two that the model made before.

    These are what leaves layers before such a place, what enters the first layer, and what modules outside of all
    layers return.

    Args:
        evidence: The recorded forward pass.
        layers: The layers that ran.
        after: The layer.

    Returns:
        The sum in words; None if no two of them add up to what the layer reads.
    """
    call = evidence.of(after).call(after.path)
    goal = None if call is None else call.stream_in
    if call is None or goal is None:
        return None
    made = [(name, tensor) for name, tensor in _made_before(evidence, layers, call) if tensor.shape == goal.shape]
    made = made[-MOST:]
    for count in (1, 2):
        for chosen in itertools.combinations(reversed(made), count):
            tried = fit(goal, [tensor for _, tensor in chosen], False)
            if tried.error <= evidence.tolerance:
                return " + ".join(name for name, _ in reversed(chosen))
    return None


def _made_before(evidence: Evidence, layers: list[Layer], reading: Call) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of what may be read at a seam, in the order in which it was made."""
    found: list[tuple[int, str, torch.Tensor]] = []
    first = evidence.of(layers[0]).call(layers[0].path)
    if first is not None and first.stream_in is not None:
        found.append((first.began, "what enters the first layer", first.stream_in))
    for before, after in itertools.pairwise(layers):
        call = evidence.of(before).call(before.path)
        if may_be_seam(before, after) and call is not None and call.stream_out is not None:
            found.append((call.ended, f"layer {before.index}", call.stream_out))
    inside = tuple(f"{layer.path}." for layer in layers)
    for path, calls in evidence.recording.calls.items():
        if not f"{path}.".startswith(inside):
            found += [(c.ended, generic_path(path), c.stream_out) for c in calls if c.stream_out is not None]
    found.sort(key=lambda entry: entry[0])
    yield from ((name, tensor) for ended, name, tensor in found if ended < reading.began)
