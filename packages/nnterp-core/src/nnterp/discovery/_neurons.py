"""Find the neurons of feed-forwards: the input of the projection that ends one."""

from __future__ import annotations

from torch import nn

from nnterp.anatomy import Layer, Part
from nnterp.discovery._linears import arguments_of, ending, linears
from nnterp.discovery._recording import Recording
from nnterp.tensors import same
from nnterp.traced import Place, Site


def find_neurons(root: nn.Module, layer: Layer, recording: Recording, tolerance: float) -> Place | str:
    """Where the neurons of a layer's feed-forward are served, or why they are not."""
    if layer.mlp is None:
        return "the layer has no MLP"
    if layer.mixture_of_experts:
        return "a mixture of experts has no one set of neurons: each expert runs on the tokens routed to it"
    result = recording.made(layer.mlp.exit)
    if result is None:
        return "the layer does not run on text"
    candidates = linears(root, layer.mlp, recording)
    found = ending(candidates, result, arguments_of(layer.mlp, recording), tolerance, multiples=True)
    if found is not None:
        return Site(found.path, "input")
    for one in candidates:  # RWKV's output is gated by another projection of its input
        for gate in candidates:
            alike = gate is not one and one.made.shape == gate.made.shape == result.shape
            if alike and same(one.made * gate.made.sigmoid(), result, tolerance):
                return Site(one.path, "input")
    return f"the feed-forward ({layer.mlp}) does not end in one projection"


def find_shared_neurons(root: nn.Module, layer: Layer, recording: Recording, tolerance: float) -> Place | str:
    """Where the neurons of the shared expert, which runs on all tokens, are served, or why they are not."""
    if layer.mlp is None or not layer.mixture_of_experts:
        return "the layer has no mixture of experts"
    result = recording.made(layer.mlp.exit)
    if result is None:
        return "the layer does not run on text"
    parts = [p.path or p.entry for p in (layer.self_attn, layer.mixer, layer.mlp) if p is not None]
    mixers = tuple(f"{path}." for path in parts[:-1])
    ended = sorted(recording.calls, key=lambda path: recording.calls[path][0].ended)
    for path in ended:
        inner = path.removeprefix(f"{layer.path}.")
        one_of_many = any(piece.isdigit() for piece in inner.split("."))
        if inner == path or one_of_many or path in parts or path.startswith(mixers):
            continue
        made, expert = recording.made(path), Part.module(path)
        if made is None or made.numel() != result.numel() or made.shape[-1] != result.shape[-1]:
            continue
        candidates = linears(root, expert, recording)
        if len(candidates) < 2:
            continue
        found = ending(candidates, made, arguments_of(expert, recording), tolerance, multiples=True)
        if found is not None:
            return Site(found.path, "input")
    return "no expert that runs on all tokens, and ends in one projection, was seen"
