"""What layers return beside the stream, and which of their arguments each of these things comes from."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from nnterp.anatomy import Anatomy, Layer
from nnterp.certificate._evidence import Evidence
from nnterp.discovery import Call, Recording, record

Key = int | str | None


def returns_of(evidence: Evidence, anatomy: Anatomy) -> tuple[tuple[Key, ...] | None, ...]:
    """For each layer, see `Readout.returns`: what a skipped layer has to return beside the stream."""
    outputs = [_output(evidence.recording, layer) for layer in anatomy.blocks]
    longest = max((len(o) for o in outputs if isinstance(o, (tuple, list))), default=0)
    recording = evidence.recording
    if longest > 1 and not evidence.on_meta:
        recording = _with_cache(evidence, anatomy)
    layers = evidence.ran(anatomy)
    through = tuple(_passed_through(recording, layers, entry) for entry in range(1, longest))
    found: list[tuple[Key, ...] | None] = []
    for layer in anatomy.blocks:
        output = _output(recording, layer)
        found.append(through[: len(output) - 1] if isinstance(output, (tuple, list)) else None)
    return tuple(found)


def _output(recording: Recording, layer: Layer) -> Any:
    call = recording.call(layer.path)
    return None if call is None else call.output


def _with_cache(evidence: Evidence, anatomy: Anatomy) -> Recording:
    """The same forward pass with a cache, because layers pass states on only then."""
    ids = evidence.probe_ids(1, evidence.length)
    try:
        layers = {layer.path for layer in anatomy.blocks}
        return record(evidence.module, lambda: evidence.module(**evidence.inputs(ids)), modules=layers)
    except Exception:
        return evidence.recording


def _passed_through(recording: Recording, layers: list[Layer], entry: int) -> Key:
    """The argument that a layer passes on as the `entry`-th thing it returns (a recurrent state), if any.

    A layer that is given what the layer before it returned shows it. For a state of the layer's own, which comes and
    goes with the cache, it is the argument that holds tensors of the same shapes.
    """
    for before, after in itertools.pairwise(layers):
        source, target = recording.of(before).call(before.path), recording.of(after).call(after.path)
        if source is None or target is None or not isinstance(source.output, (tuple, list)):
            continue
        made = source.output[entry] if len(source.output) > entry else None
        if made is None:
            continue
        for key, value in _other_arguments(target):
            if _equal(made, value):
                return key
        for key, value in _other_arguments(source):
            if not isinstance(made, torch.Tensor) and _same_shapes(made, value):
                return key
    return None


def _other_arguments(call: Call) -> list[tuple[int | str, Any]]:
    """A layer's arguments beside the stream."""
    given: list[tuple[int | str, Any]] = [*enumerate(call.args), *call.kwargs.items()]
    return [(key, value) for key, value in given if key not in (0, "hidden_states")]


def _equal(a: Any, b: Any) -> bool:
    """Whether two things are the same object, equal tensors, or containers of such."""
    if a is b:
        return a is not None
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape == b.shape and a.device.type != "meta" and torch.equal(a, b)
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)) and len(a) == len(b) > 0:
        return all(x is y or _equal(x, y) for x, y in zip(a, b, strict=True))
    return False


def _same_shapes(a: Any, b: Any) -> bool:
    """Whether two containers hold tensors of the same shapes."""
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.shape == b.shape
    both = isinstance(a, (tuple, list)) and isinstance(b, (tuple, list))
    return both and len(a) == len(b) > 0 and all(map(_same_shapes, a, b))
