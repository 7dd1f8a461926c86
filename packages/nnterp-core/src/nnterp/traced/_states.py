"""The recurrent state of a mixer, read and written as it is handed to the cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from nnsight.intervention.interleaver import OutOfOrderError
from transformers.cache_utils import Cache

from nnterp.errors import Unavailable
from nnterp.record import Record

if TYPE_CHECKING:
    from nnterp.traced._running import Place, Running


class State(Record):
    """A state that an operation hands to the cache; it exists only in a run with a cache."""

    def __init__(self, place: Place) -> None:
        self.place = place

    def read(self, model: Running, label: str) -> torch.Tensor:
        """The state after the last position, as it is handed to the cache."""
        try:
            return self.place.read(model, label)
        except OutOfOrderError as error:
            error.args = (f"states are kept in runs with a cache (use_cache=True) only. {error.args[0]}",)
            raise

    def write(self, model: Running, tensor: torch.Tensor, label: str) -> None:
        """Replace what the cache keeps: the next tokens go on from it."""
        self.place.write(model, tensor, label)

    def __str__(self) -> str:
        return f"{self.place} (in runs with a cache)"


class CachedState(Record):
    """A state in transformers' cache, read when its mixer has ended: after the prompt, and after every token.

    Attributes:
        path: The module, which is handed the cache.
        layer: The cache's number of its layer.
    """

    def __init__(self, path: str, layer: int) -> None:
        self.path, self.layer = path, layer

    def read(self, model: Running, label: str) -> torch.Tensor:
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

    def write(self, model: Running, tensor: torch.Tensor, label: str) -> None:
        """Replace what the cache keeps: the next tokens go on from it."""
        with torch.no_grad():
            self.read(model, label).copy_(tensor)

    def __str__(self) -> str:
        return f"the cache's recurrent state of layer {self.layer}, as {self.path} leaves it (in runs with a cache)"
