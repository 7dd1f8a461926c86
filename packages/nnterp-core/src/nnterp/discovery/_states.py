"""The recurrent state of linear attention and state space layers: what such a layer hands to the cache.

It is found by the call with which a mixer keeps it: a method of transformers' cache that is neither of keys and values
nor of a convolution's inputs. Where that is the cache's own recurrent state, it is read there when the mixer has ended,
for many mixers change it in place at the tokens after the prompt; otherwise what the call is given is served. In models
that keep it on the module itself, it is what is assigned there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from nnsight.intervention.interleaver import OutOfOrderError
from torch import nn
from transformers.cache_utils import Cache

from nnterp.anatomy import Layer
from nnterp.errors import Unavailable
from nnterp.record import Record
from nnterp.values._attention import returned, watched
from nnterp.values._operations import Operation, record_operations, same, tensors
from nnterp.values._places import Inside, Place

if TYPE_CHECKING:
    from nnterp.standardized_transformer import StandardizedTransformer
    from nnterp.traced_transformer import TracedTransformer

# The cache's methods for keys and values, for a convolution's inputs, and for the keys of an indexer.
_OTHERS = ("update", "update_conv_state", "update_indexer")


class State(Record):
    """A state, which there is only in a run with a cache."""

    def __init__(self, place: Place) -> None:
        self.place = place

    def read(self, model: TracedTransformer, label: str) -> torch.Tensor:
        """The state after the last position, as it is handed to the cache."""
        try:
            return self.place.read(model, label)
        except OutOfOrderError as error:
            error.args = (f"states are kept in runs with a cache (use_cache=True) only. {error.args[0]}",)
            raise

    def write(self, model: TracedTransformer, tensor: torch.Tensor, label: str) -> None:
        """Replace what the cache keeps: the next tokens go on from it."""
        self.place.write(model, tensor, label)

    def __str__(self) -> str:
        return f"{self.place} (in runs with a cache)"


class Kept(Record):
    """A state in transformers' cache, as a module leaves it there: after the prompt, and after every token.

    Attributes:
        path: The module, which is handed the cache.
        layer: The cache's number of its layer.
    """

    def __init__(self, path: str, layer: int) -> None:
        self.path, self.layer = path, layer

    def read(self, model: TracedTransformer, label: str) -> torch.Tensor:
        """The cache's own tensor, once the module has ended; this invoke's rows of it."""
        from nnsight.intervention.interleaver import Mediator

        mediator, envoy = Mediator.current("a value"), model.envoy(self.path)
        caches = mediator.__dict__.setdefault("_nnterp_caches", {})
        if self.path not in caches:  # one run has one cache, and what the module was called with is passed only once
            args, kwargs = envoy.inputs
            caches[self.path] = next((x for x in (*args, *kwargs.values()) if isinstance(x, Cache)), None)
        if caches[self.path] is None:
            raise Unavailable(f"{label}: states are kept in runs with a cache only. Run it with use_cache=True.")
        envoy.output  # noqa: B018  (the state is there when the module has ended)
        state = caches[self.path].layers[self.layer].recurrent_states[0]
        group, batcher = mediator.batch_group, model.interleaver.batcher
        return state if group is None or batcher is None or not batcher.batching else state.narrow(0, *group)

    def write(self, model: TracedTransformer, tensor: torch.Tensor, label: str) -> None:
        """Replace what the cache keeps: the next tokens go on from it."""
        with torch.no_grad():
            self.read(model, label).copy_(tensor)

    def __str__(self) -> str:
        return f"the cache's recurrent state of layer {self.layer}, as {self.path} leaves it (in runs with a cache)"


def find_states(model: StandardizedTransformer) -> list[Place | str]:
    """Per layer, where its state is served, or why it is not."""
    from nnterp.values._probe import Probe, held, probing
    from nnterp.values._serve import findings

    blocks = model.anatomy.blocks
    if all(block.mixer == block.self_attn for block in blocks) and not _has_states(model._module):
        return ["its mixer is softmax attention, whose state is its keys and values"] * len(blocks)
    with probing(model) as device:
        probe = Probe(model, device)
        probe.inputs["use_cache"] = True
        parts = {block.index: [p for p in (block.mixer, block.self_attn) if p is not None] for block in blocks}
        paths = list(dict.fromkeys(p for each in parts.values() for part in each for p in watched(model._module, part)))
        before = {path: held(model._module.get_submodule(path)) for path in paths}
        try:
            operations = record_operations(model._module, paths, probe.run)
        except Exception as error:  # a model that does not run with a cache keeps no state
            return [f"the model does not run with a cache ({type(error).__name__}: {error})"] * len(blocks)
        found: list[Place | str] = []
        for block in blocks:
            mine = [
                o for part in parts[block.index] for path in watched(model._module, part) for o in operations.of(path)
            ]
            place = next(_handed_on(mine), None) or next(_assigned(model._module, mine, before), None)
            found.append(place if place is not None else _reason(block, mine))
        for key, text in operations.texts.items():
            findings(model).texts.setdefault(key, text)
    return found


def _has_states(module: nn.Module) -> bool:
    """Whether attention layers keep more than keys and values."""
    config = getattr(module, "config", None)
    kinds = getattr(config.get_text_config() if config is not None else None, "layer_types", None) or ()
    return any(kind not in ("full_attention", "sliding_attention", "chunked_attention") for kind in kinds)


def _handed_on(operations: list[Operation]) -> Iterator[Place]:
    """What is handed to the cache; transformers' own is read itself, for it may be changed in place later on."""
    for operation in operations:
        owner = getattr(operation.function, "__self__", None)
        if not isinstance(owner, Cache) or operation.called in _OTHERS or operation.times > 1:
            continue
        number = operation.kwargs.get("layer_idx", operation.args[1] if len(operation.args) > 1 else None)
        if operation.called == "update_recurrent_state" and isinstance(number, int):
            yield Kept(operation.path, number)
        for key, tensor in tensors(operation):
            if tensor.is_floating_point() and tensor.dim() >= 2:
                yield State(Inside(operation.path, operation.labels, "input", key))


def _assigned(
    root: nn.Module, operations: list[Operation], before: dict[str, dict[str, torch.Tensor]]
) -> Iterator[Place]:
    """What an operation returned and its module has kept (RecurrentGemma)."""
    from nnterp.values._probe import held

    for operation in operations:
        for name, state in held(root.get_submodule(operation.path)).items():
            if state is before[operation.path].get(name) or "conv" in name or operation.function is None:
                continue
            for key, tensor in returned(operation):
                if same(tensor, state, 0.0):
                    yield State(Inside(operation.path, operation.labels, "output", key))


def _reason(block: Layer, operations: list[Operation]) -> str:
    if block.mixer is None:
        return "the layer has no mixer"
    if any(isinstance(getattr(o.function, "__self__", None), Cache) and o.called == "update" for o in operations):
        return "its mixer is softmax attention, whose state is its keys and values"
    if any(o.called == "update_conv_state" for o in operations):
        return "its mixer is a convolution, which keeps its last inputs and no recurrent state"
    return "its state is no one tensor that an operation hands to the cache; the model returns it (model.output)"
