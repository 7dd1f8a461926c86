"""The place of each value of a model in vLLM, or the reason why it has none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from nnterp.errors import Unavailable
from nnterp.table import VALUES
from nnterp.traced import Place
from nnterp.vllm._places import Given, Returned, Scaled, StreamIn, StreamOut
from nnterp.vllm._structure import Block, Parts

Where: TypeAlias = Place | str  # a place, or why there is none

_FUSED = "vLLM computes attention in one fused kernel over paged keys, which makes no patterns"
_NOT_SERVED = "nnterp does not serve it on vLLM; StandardizedTransformer does"
_REASONS = {
    "attention_scores": _FUSED,
    "attention_probabilities": _FUSED,
    "mixer_states": "vLLM keeps states in a cache of its own",
}

_PER_LAYER: dict[str, tuple[str, Callable[[Block, str], Place]]] = {
    "layers_input": ("path", lambda block, path: StreamIn(path)),
    "layers_output": ("path", lambda block, path: StreamOut(path)),
    "layers_mid": ("before_mlp", lambda block, path: StreamIn(path)),
    "attentions_input": ("attention", lambda block, path: Given(path)),
    "attentions_output": ("attention", lambda block, path: Returned(path)),
    "attention_queries": ("core", lambda block, path: Given(path, 0, block.heads)),
    "attention_keys": ("core", lambda block, path: Given(path, 1, block.kv_heads)),
    "attention_values": ("core", lambda block, path: Given(path, 2, block.kv_heads)),
    "attention_head_outputs": ("w_out", lambda block, path: Given(path, 0, block.heads)),
    "mlps_input": ("mlp", lambda block, path: Given(path)),
    "mlps_output": ("mlp", lambda block, path: Returned(path)),
    "mlp_neurons": ("w_down", lambda block, path: Given(path)),
}
_WHOLE = {"token_embeddings": "embed_tokens", "ln_final_output": "ln_final"}


class Served:
    """The place of every value of one model. It is sent with every request, so it is small.

    Attributes:
        whole: Value that is not per layer → its place, or the reason why it has none.
        layers: Value that is per layer → the same, for each layer.
    """

    def __init__(self, whole: dict[str, Where], layers: dict[str, tuple[Where, ...]]) -> None:
        self.whole, self.layers = whole, layers

    def place(self, name: str, layer: Any, model_class: str) -> Place:
        """The place of a value; `layer` is None for one that is not per layer.

        Raises:
            Unavailable: It has none; says why, and which layers have it.
        """
        if name in self.whole:
            found, where = self.whole[name], name
        else:
            every = self.layers[name]
            found, where = every[layer if isinstance(layer, int) else 0], f"{name}[{layer!r}]"
            if not isinstance(layer, int) and not isinstance(found, str):
                found = "its layers hold one attention each, and are indexed by one number"
        if not isinstance(found, str):
            return found
        there = self.having(name)
        also = f" Layers {', '.join(map(str, there))} have it." if there else ""
        raise Unavailable(f"{where} is not available in vLLM's {model_class}: {found}.{also}")

    def having(self, name: str) -> tuple[int, ...]:
        """The layers that have a value."""
        return tuple(i for i, found in enumerate(self.layers.get(name, ())) if not isinstance(found, str))

    def without(self, name: str, layer: int | None, reason: str) -> Served:
        """A copy in which one value at one layer has no place, for this reason."""
        if layer is None:
            return Served({**self.whole, name: reason}, self.layers)
        every = self.layers[name]
        return Served(self.whole, {**self.layers, name: (*every[:layer], reason, *every[layer + 1 :])})


def served(parts: Parts) -> Served:
    """The places of a model's values, from its structure alone."""
    whole: dict[str, Where] = {}
    layers: dict[str, tuple[Where, ...]] = {}
    for name, value in VALUES.items():
        reason = _REASONS.get(name, _NOT_SERVED)
        if name in _WHOLE:
            path = getattr(parts, _WHOLE[name])
            scale = parts.embedding_scale if name == "token_embeddings" else None
            if scale is not None:
                whole[name] = Scaled(path, parts.stack.rpartition(".")[0], scale)
                continue
            whole[name] = Returned(path) if path else f"its structure does not tell which module is {_WHOLE[name]}"
        elif not value.per_layer:
            whole[name] = reason
        elif name not in _PER_LAYER:
            layers[name] = (reason,) * len(parts.blocks)
        else:
            layers[name] = tuple(_of_layer(block, *_PER_LAYER[name]) for block in parts.blocks)
    return Served(whole, layers)


def _of_layer(block: Block, field: str, make: Callable[[Block, str], Place]) -> Where:
    path = getattr(block, field)
    if path is not None:
        return make(block, path)
    behind = {"core": "attention", "w_out": "attention", "w_down": "mlp", "before_mlp": "mlp"}
    return block.reasons.get(field) or block.reasons[behind[field]]
