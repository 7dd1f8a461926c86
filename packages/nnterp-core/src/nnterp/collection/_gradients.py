"""Gradients of a scalar with respect to values of the table, as plain tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import nnsight
import torch
from torch.autograd.graph import GradientEdge

from nnterp.arguments import device_of
from nnterp.collection._differentiation import GradientReads, gradients_at, note
from nnterp.collection._keys import read_key
from nnterp.collection._outputs import Index
from nnterp.collection._plan import make_plan
from nnterp.defaults import plain_defaults
from nnterp.errors import PaddingError, RemoteModelError
from nnterp.frozen import freeze, frozen_kinds, require_frozen
from nnterp.indices import Indices
from nnterp.inputs import Batch, encode, forward_flags, left_padded, pad, sharing_side
from nnterp.named_transformer import NamedTransformer
from nnterp.values import get_value


@dataclass(frozen=True)
class Gradients:
    """Values, and the gradients of a metric with respect to them.

    `gradients["layers_output"]` is `[layers, prompts, seq, ...]`, `gradients["layers_output", 3]` and
    `gradients["blocks.3.hook_resid_post"]` one layer of it; `gradients.values` holds the values under the same names.
    Prompts of different lengths are padded on the left; `batch` says where each row's tokens stand.

    Attributes:
        metric: The metric's value.
        logits: `[prompts, seq, vocab]`, as the metric was given them.
        batch: The prompts as one padded batch.
        layers: Value → the layers in its first axis.
        num_layers: Layers of the model: a negative index counts from its last layer, as everywhere.
    """

    metric: torch.Tensor
    logits: torch.Tensor
    batch: Batch
    layers: dict[str, tuple[Index, ...]]
    _values: dict[tuple[str, Index | None], torch.Tensor]
    _gradients: dict[tuple[str, Index | None], torch.Tensor]
    num_layers: int

    def __getitem__(self, key: str | tuple[str, Index]) -> torch.Tensor:
        """The gradient with respect to a value, or to one layer of it.

        Raises:
            KeyError: It was not asked for.
            ValueError: The layers of this value differ in shape: ask for one.
        """
        return self._pick(self._gradients, key)

    def value(self, key: str | tuple[str, Index]) -> torch.Tensor:
        """Look up the value itself, under the same names.

        Returns:
            The tensor, of the shape, dtype and device of its gradient.
        """
        return self._pick(self._values, key)

    def __iter__(self) -> Any:
        return iter(self.layers)

    def __contains__(self, name: object) -> bool:
        try:
            read_key(name, self.layers, self.num_layers, "asked for")
        except (KeyError, TypeError):
            return False
        return True

    def _pick(self, table: dict[tuple[str, Index | None], torch.Tensor], key: str | tuple[str, Index]) -> torch.Tensor:
        name, layer = read_key(key, self.layers, self.num_layers, "asked for")
        have = self.layers[name]
        if layer is not None or not have:
            return table[name, layer]
        shapes = {tuple(table[name, i].shape) for i in have}
        if len(shapes) > 1:
            raise ValueError(f"The layers of {name} differ in shape; ask for one: gradients[{name!r}, {have[0]}].")
        return torch.stack([table[name, i] for i in have])


@plain_defaults()
def gradients(
    model: NamedTransformer,
    prompts: Any,
    metric: Callable[[torch.Tensor], torch.Tensor],
    values: str | Iterable[str],
    layers: Indices = None,
    device: str | torch.device = "cpu",
    remote: Any = False,
    frozen: Any = (),
) -> Gradients:
    """See `StandardizedTransformer.gradients`.

    Returns:
        As that method.

    Raises:
        TypeError: `metric` is no function.
        RuntimeError: Called under `no_grad` or `inference_mode`.
        RemoteModelError: `frozen` and `remote` are both given.
        PaddingError: Prompts of different lengths do not share a batch in this model.
    """
    model.require_no_trace("gradients()")
    held = frozen_kinds(frozen)
    if held and remote:
        raise RemoteModelError(
            f"gradients(frozen={frozen!r:.80}, remote=...) is refused: what holds parts of a model still runs beside "
            "it, and the remote worker has no nnterp. Load the weights here, or leave out frozen=."
        )
    device = device_of(device)
    if not callable(metric):
        raise TypeError(f"metric is a function from logits to one number, not {metric!r:.80}.")
    if not torch.is_grad_enabled():
        raise RuntimeError(
            "gradients() was called under torch.no_grad() or inference_mode, where nothing has a gradient. Call it "
            "outside."
        )
    model.prepare(remote)
    require_frozen(model, held)
    plan = make_plan(model, values, layers)
    rows = encode(model, prompts)
    if len({sharing_side(model, row) for row in rows}) > 1:
        raise PaddingError(
            f"gradients() runs its prompts in one batch, and {model.model_class} is proven to give a padded row the "
            f"numbers of the row alone only for {model.sharing} (without a certificate, call model.validate()). These "
            f"have {', '.join(map(str, sorted({len(row) for row in rows})))} tokens. Take the gradients of prompts "
            "that may share a batch together, and of others in calls of their own."
        )
    with left_padded(model.tokenizer):
        batch = pad(model, rows)
    keys = [(target.value.name, target.layer) for target in plan.targets]
    to_read = GradientReads(model, keys)
    order, wanted, names = to_read.places, to_read.wanted, to_read.names
    inputs = {**batch.encoding, **forward_flags(model)}
    with freeze(model, held), model.trace(inputs, remote=remote):
        edges: list[GradientEdge | None] = []
        kept: list[torch.Tensor] = []
        for place, name in zip(order, names, strict=True):
            tensor = place.read(model, name)
            if (held or not kept) and not tensor.requires_grad and tensor.is_floating_point():
                tensor.requires_grad_(True)  # frozen weights, or a value that is held still: the graph begins here
            note(tensor, edges, kept)
        found = nnsight.save((*_differentiated(metric, model.logits, edges, kept, wanted, names), kept))
    score, logits, slopes, copies = found
    values_, gradients_ = (
        {key: _shaped(tensor, key[0], len(rows)).to(device) for key, tensor in tensors.items()}
        for tensors in to_read.combined(copies, slopes)
    )
    return Gradients(score.to(device), logits.to(device), batch, plan.layers, values_, gradients_, model.num_layers)


def _shaped(tensor: torch.Tensor, name: str, rows: int) -> torch.Tensor:
    """`[rows, seq, ...]`, where a model may keep batch and positions in one axis."""
    return tensor.unflatten(0, (rows, -1)) if tensor.dim() < get_value(name).axes else tensor


def _differentiated(
    metric: Callable[[torch.Tensor], torch.Tensor],
    logits: torch.Tensor,
    edges: list[GradientEdge | None],
    kept: list[torch.Tensor],
    wanted: list[int],
    names: list[str],
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """The score, the logits, and the gradients with respect to what is wanted of what was read."""
    score = metric(logits)
    if not isinstance(score, torch.Tensor) or score.numel() != 1:
        got = list(score.shape) if isinstance(score, torch.Tensor) else type(score).__name__
        raise ValueError(f"The metric must make one number of the logits {list(logits.shape)}; it made {got}.")
    return score.detach(), logits.detach(), gradients_at(score, edges, kept, wanted, names)
