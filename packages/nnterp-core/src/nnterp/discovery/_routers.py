"""Find the router of a mixture of experts: its logits where they decide, and the experts it chooses."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from nnterp.anatomy import Layer
from nnterp.discovery._probe import Probe
from nnterp.discovery._recording import Recording
from nnterp.tensors import same
from nnterp.traced import Inside, Item, Place, ReadOnly, Site

NO_EXPERTS = "the layer has no mixture of experts"
NO_LOGITS = "transformers records no router logits for this model"
NO_CHOICES = "its router does not return which experts it chose"
USED = "its router has chosen by them when it returns them"


def router_path(root: nn.Module, block: Layer) -> str | None:
    """Path of the router's module in one layer; None if transformers records none."""
    found = _recorded(root, block)
    return None if found is None else found[0]


class Routers:
    """The search, over the layers of one model."""

    def __init__(self, probe: Probe, recording: Recording) -> None:
        self.probe, self.recording = probe, recording
        self.deciding: dict[tuple[type, tuple[str, ...]], bool] = {}

    def of(self, block: Layer) -> tuple[Place | str, Place | str]:
        """(logits, chosen experts) of one layer: places, or reasons."""
        if block.mlp is None or not block.mixture_of_experts:
            return NO_EXPERTS, NO_EXPERTS
        found = _recorded(self.probe.module, block)
        if found is None:
            return NO_LOGITS, NO_CHOICES
        path, index = found
        call = self.recording.call(path)
        output = None if call is None else call.output
        if isinstance(output, torch.Tensor):
            return Site(path, "output"), NO_CHOICES
        if not isinstance(output, (tuple, list)):
            return NO_LOGITS, NO_CHOICES
        whole = [
            i for i, o in enumerate(output) if isinstance(o, torch.Tensor) and not o.is_floating_point() and o.dim() > 1
        ]
        chosen = Item(path, whole[-1]) if whole else NO_CHOICES
        if index >= len(output) or not isinstance(output[index], torch.Tensor):
            return NO_LOGITS, chosen
        labels = self.decides(path, index, output)
        return (ReadOnly(Item(path, index), USED) if labels is None else Inside(path, labels)), chosen

    def decides(self, path: str, index: int, output: Any) -> tuple[str, ...] | None:
        """The operation that makes the logits, once it is proven that what the router returns depends on it."""
        logits = output[index]
        rest = [o for i, o in enumerate(output) if i != index and isinstance(o, torch.Tensor)]
        for operation in sorted(self.recording.operations_of(path), key=lambda o: o.ended):
            if operation.times > 1 or not same(operation.output, logits, self.probe.tolerance):
                continue
            kind = (type(self.probe.module.get_submodule(path)), operation.labels)
            if kind not in self.deciding:
                edits = {(path, operation.labels): _reversed}
                after = self.probe.record(modules=[path], operations=[path], edits=edits, arguments=False).call(path)
                now = () if after is None else after.output or ()
                others = [o for i, o in enumerate(now) if i != index and isinstance(o, torch.Tensor)]
                self.deciding[kind] = any(
                    a.shape != b.shape or not torch.equal(a, b) for a, b in zip(rest, others, strict=True)
                )
            if self.deciding[kind]:
                return operation.labels
        return None


def _reversed(logits: torch.Tensor) -> torch.Tensor:
    """The scores of the experts in reverse."""
    return logits.flip(-1)


def _recorded(root: nn.Module, block: Layer) -> tuple[str, int] | None:
    """(path, index of the logits in its output) of a layer's router, as transformers records it."""
    if block.mlp is None or not block.mixture_of_experts:
        return None
    top = block.mlp.path or block.mlp.entry
    records = [
        entry
        for module in root.modules()
        if isinstance(table := getattr(module, "_can_record_outputs", None), dict)
        for entry in (table.get("router_logits") or (),)
    ]
    entries = [e for record in records for e in (record if isinstance(record, (list, tuple)) else [record])]
    for entry in entries:
        target, index, name = (
            getattr(entry, "target_class", entry),
            getattr(entry, "index", 0) or 0,
            getattr(entry, "layer_name", None),
        )
        if not isinstance(target, type):
            continue
        for inner, module in root.get_submodule(top).named_modules():
            path = f"{top}.{inner}" if inner else top
            if isinstance(module, target) and (name is None or name in path):
                return path, index
    return None
