"""Find the router of a mixture of experts: its logits where they decide, and the experts it chooses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from nnterp.anatomy import Layer
from nnterp.discovery._probe import Probe
from nnterp.discovery._recording import Labels, Operation, Recording
from nnterp.tensors import same
from nnterp.traced import Inside, Item, Place, ReadOnly, Site

NO_EXPERTS = "the layer has no mixture of experts"
NO_LOGITS = "transformers records no router logits for this model"
NO_CHOICES = "its router does not return which experts it chose"
USED = "its router has chosen by them when it returns them"


def router_path(root: nn.Module, layer: Layer) -> str | None:
    """Path of the router's module in one layer; None if transformers records none."""
    found = recorded_router(root, layer)
    return None if found is None else found[0]


class Routers:
    """Finds the routers of one model's layers. Layers whose routers run the same code share one trial.

    Args:
        probe: A short prompt for the model.
        recording: A forward pass of the probe in which the routers' calls and operations were recorded.
    """

    def __init__(self, probe: Probe, recording: Recording) -> None:
        self.probe, self.recording = probe, recording
        self.deciding: dict[tuple[type, Labels], bool] = {}

    def of(self, layer: Layer) -> tuple[Place | str, Place | str]:
        """(logits, chosen experts) of one layer: for each its place, or the reason why it has none."""
        if layer.mlp is None or not layer.mixture_of_experts:
            return NO_EXPERTS, NO_EXPERTS
        found = recorded_router(self.probe.module, layer)
        if found is None:
            return NO_LOGITS, NO_CHOICES
        path, index = found
        recording = self.recording.of(layer)
        call = recording.call(path)
        output = None if call is None else call.output
        if isinstance(output, torch.Tensor):
            return Site(path, "output"), NO_CHOICES
        if not isinstance(output, (tuple, list)):
            return NO_LOGITS, NO_CHOICES
        return self.logits(recording, path, index, output), _choices(path, output)

    def logits(self, recording: Recording, path: str, index: int, output: Sequence[Any]) -> Place | str:
        """Where the logits of a router that returns several things are served; read-only if no write was proven."""
        if index >= len(output) or not isinstance(output[index], torch.Tensor):
            return NO_LOGITS
        for operation in sorted(recording.operations_of(path), key=lambda o: o.ended):
            holds = operation.times == 1 and same(operation.output, output[index], self.probe.tolerance)
            if holds and self.decides(operation, index, output):
                return Inside(path, operation.labels)
        return ReadOnly(Item(path, index), USED)

    def decides(self, operation: Operation, index: int, output: Sequence[Any]) -> bool:
        """Whether the rest of the router's output changes when the logits that an operation returns are reversed."""
        path, labels = operation.path, operation.labels
        kind = (type(self.probe.module.get_submodule(path)), labels)
        if kind not in self.deciding:
            edits = {(path, labels): _reversed}
            after = self.probe.record(modules=[path], operations=[path], edits=edits, arguments=False).call(path)
            edited = () if after is None else after.output or ()
            pairs = zip(_without(output, index), _without(edited, index), strict=True)
            self.deciding[kind] = any(a.shape != b.shape or not torch.equal(a, b) for a, b in pairs)
        return self.deciding[kind]


def _reversed(logits: torch.Tensor) -> torch.Tensor:
    """The scores of the experts in reverse."""
    return logits.flip(-1)


def _without(output: Sequence[Any], index: int) -> list[torch.Tensor]:
    """The tensors of an output, except the one at `index`."""
    return [item for i, item in enumerate(output) if i != index and isinstance(item, torch.Tensor)]


def _choices(path: str, output: Sequence[Any]) -> Place | str:
    """Where the chosen experts are served: the last tensor of whole numbers that the router returns."""
    whole = [
        i for i, o in enumerate(output) if isinstance(o, torch.Tensor) and not o.is_floating_point() and o.dim() > 1
    ]
    return Item(path, whole[-1]) if whole else NO_CHOICES


def recorded_router(root: nn.Module, layer: Layer) -> tuple[str, int] | None:
    """(path, index of the logits in its output) of a layer's router; None if transformers records none."""
    if layer.mlp is None or not layer.mixture_of_experts:
        return None
    top = layer.mlp.path or layer.mlp.entry
    for router, index, name in _declared(root):
        for inner, module in root.get_submodule(top).named_modules():
            path = f"{top}.{inner}" if inner else top
            if isinstance(module, router) and (name is None or name in path):
                return path, index
    return None


def _declared(root: nn.Module) -> Iterator[tuple[type, int, str | None]]:
    """(class, index of the logits in its output, part of its path or None) of each router that transformers records."""
    for module in root.modules():
        table = getattr(module, "_can_record_outputs", None)
        declared = (table.get("router_logits") or ()) if isinstance(table, dict) else ()
        for entry in declared if isinstance(declared, (list, tuple)) else (declared,):
            router = getattr(entry, "target_class", entry)
            if isinstance(router, type):
                yield router, getattr(entry, "index", 0) or 0, getattr(entry, "layer_name", None)
