"""Find the recurrent state of linear attention and state space layers.

A mixer stores its state by calling a method of transformers' cache. The methods for keys and values, and for the
inputs of a convolution, are ruled out by name. If the method is `update_recurrent_state`, the state is read from the
cache after the mixer has run, because many mixers change it in place at the tokens after the prompt. For any other
method, the state is the tensor that the method is given. Some models keep the state as an attribute of the module;
there, it is what the operation that made that tensor returns.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from transformers.cache_utils import Cache

from nnterp.anatomy import Layer, Part
from nnterp.discovery._probe import Probe
from nnterp.discovery._quiet import held_tensors, quiet
from nnterp.discovery._recording import Labels, Operation, SourceText
from nnterp.discovery.attention import with_code
from nnterp.huggingface import text_config
from nnterp.tensors import same
from nnterp.traced import CachedState, Inside, Place, State

# The cache's methods for keys and values, for a convolution's inputs, and for the keys of an indexer.
_OTHERS = ("update", "update_conv_state", "update_indexer")

States = tuple[list[Place | str], dict[tuple[str, Labels], SourceText]]


def find_states(probe: Probe) -> States:
    """Find where the state of each layer is served.

    Returns:
        Per layer, the place of its state or the reason why it has none; and the source of the instrumented functions,
        by (module path, labels).
    """
    module, layers = probe.module, probe.anatomy.blocks
    if all(layer.mixer == layer.self_attn for layer in layers) and not _has_states(module):
        return ["its mixer is softmax attention, whose state is its keys and values"] * len(layers), {}
    probe.inputs["use_cache"] = True
    paths = {layer.index: [p for part in _mixers(layer) for p in with_code(module, part)] for layer in layers}
    every = list(dict.fromkeys(path for own in paths.values() for path in own))
    with quiet(module):
        before = {path: held_tensors(module.get_submodule(path)) for path in every}
        try:
            recording = probe.record(operations=every)
        except Exception as error:  # a model that does not run with a cache keeps no state
            return [f"the model does not run with a cache ({type(error).__name__}: {error})"] * len(layers), {}
        found: list[Place | str] = []
        for layer in layers:
            operations = [o for path in paths[layer.index] for o in recording.of(layer).operations_of(path)]
            place = next(_handed_on(operations), None) or next(_assigned(module, operations, before), None)
            found.append(place if place is not None else _reason(layer, operations))
    return found, recording.texts


def _mixers(layer: Layer) -> list[Part]:
    return [part for part in (layer.mixer, layer.self_attn) if part is not None]


def _has_states(module: nn.Module) -> bool:
    """Whether the config names layers that are not softmax attention."""
    config = getattr(module, "config", None)
    kinds = (getattr(text_config(config), "layer_types", None) if config is not None else None) or ()
    return any(kind not in ("full_attention", "sliding_attention", "chunked_attention") for kind in kinds)


def _handed_on(operations: list[Operation]) -> Iterator[Place]:
    """Places of what operations hand to the cache; for `update_recurrent_state` the cache's own tensor comes first."""
    for operation in operations:
        owner = getattr(operation.function, "__self__", None)
        if not isinstance(owner, Cache) or operation.called in _OTHERS or operation.times > 1:
            continue
        number = operation.kwargs.get("layer_idx", operation.args[1] if len(operation.args) > 1 else None)
        if operation.called == "update_recurrent_state" and isinstance(number, int):
            yield CachedState(operation.path, number)
        for key, tensor in operation.tensors_in():
            if tensor.is_floating_point() and tensor.dim() >= 2:
                yield State(Inside(operation.path, operation.labels, "input", key))


def _assigned(root: nn.Module, operations: list[Operation], before: dict[str, dict]) -> Iterator[Place]:
    """Places of what operations returned and their module keeps as an attribute (RecurrentGemma)."""
    for operation in operations:
        for name, state in held_tensors(root.get_submodule(operation.path)).items():
            if state is before[operation.path].get(name) or "conv" in name or operation.function is None:
                continue
            for key, tensor in operation.tensors_out():
                if same(tensor, state, 0.0):
                    yield State(Inside(operation.path, operation.labels, "output", key))


def _reason(layer: Layer, operations: list[Operation]) -> str:
    if layer.mixer is None:
        return "the layer has no mixer"
    if any(isinstance(getattr(o.function, "__self__", None), Cache) and o.called == "update" for o in operations):
        return "its mixer is softmax attention, whose state is its keys and values"
    if any(o.called == "update_conv_state" for o in operations):
        return "its mixer is a convolution, which keeps its last inputs and no recurrent state"
    return "its state is no one tensor that an operation hands to the cache; the model returns it (model.output)"
