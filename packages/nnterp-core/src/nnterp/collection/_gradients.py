"""Gradients of a scalar with respect to values of the table, as plain tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import nnsight
import torch

from nnterp.arguments import device_of
from nnterp.collection._keys import read_key
from nnterp.collection._plan import Plan, make_plan
from nnterp.defaults import plain_defaults
from nnterp.errors import PaddingError, RemoteModelError
from nnterp.frozen import freeze, frozen_kinds, require_frozen
from nnterp.indices import Indices
from nnterp.inputs import Batch, encode, forward_flags, left_padded, pad
from nnterp.named_transformer import NamedTransformer
from nnterp.traced import Place
from nnterp.values import Combine, gradient_reads, when


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
    layers: dict[str, tuple[int, ...]]
    _values: dict[tuple[str, int | None], torch.Tensor]
    _gradients: dict[tuple[str, int | None], torch.Tensor]
    num_layers: int

    def __getitem__(self, key: str | tuple[str, int]) -> torch.Tensor:
        """The gradient with respect to a value, or to one layer of it.

        Raises:
            KeyError: It was not asked for.
            ValueError: The layers of this value differ in shape: ask for one.
        """
        return self._pick(self._gradients, key)

    def value(self, key: str | tuple[str, int]) -> torch.Tensor:
        """The value itself, under the same names."""
        return self._pick(self._values, key)

    def __iter__(self) -> Any:
        return iter(self.layers)

    def __contains__(self, name: object) -> bool:
        try:
            read_key(name, self.layers, self.num_layers, "asked for")
        except (KeyError, TypeError):
            return False
        return True

    def _pick(self, table: dict[tuple[str, int | None], torch.Tensor], key: str | tuple[str, int]) -> torch.Tensor:
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
    """See `StandardizedTransformer.gradients`."""
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
    if len({model.sharing.side(len(row)) for row in rows}) > 1:
        raise PaddingError(
            f"gradients() runs its prompts in one batch, and {model.model_class} is proven to give a padded row the "
            f"numbers of the row alone only for {model.sharing} (without a certificate, call model.validate()). These "
            f"have {', '.join(map(str, sorted({len(row) for row in rows})))} tokens. Take the gradients of prompts "
            "that may share a batch together, and of others in calls of their own."
        )
    with left_padded(model.tokenizer):
        batch = pad(model, rows)
    sources = [gradient_reads(model, model.place(t.value.name, t.layer), t.label) for t in plan.targets]
    order = sorted({*plan.reads, *(place for places, _ in sources for place in places)}, key=lambda p: when(model, p))
    wanted = sorted({order.index(place) for places, _ in sources for place in places})
    names, inputs = [str(place) for place in order], {**batch.encoding, **forward_flags(model)}
    with freeze(model, held), model.trace(inputs, remote=remote):
        seen: list[torch.Tensor] = []
        for place, name in zip(order, names, strict=True):
            tensor = place.read(model, name)
            if (held or not seen) and not tensor.requires_grad and tensor.is_floating_point():
                tensor.requires_grad_(True)  # frozen weights, or a value that is held still: the graph begins here
            seen.append(tensor)
        found = nnsight.save(_differentiated(metric, model.logits, seen, wanted, names))
    score, logits, slopes, kept = found
    by_place = dict(zip(order, kept, strict=True))
    slope_of = {order[i]: slope for i, slope in zip(wanted, slopes, strict=True)}
    values_, gradients_ = _by_target(plan, sources, by_place, slope_of, len(rows), device)
    return Gradients(score.to(device), logits.to(device), batch, plan.layers, values_, gradients_, model.num_layers)


By = dict[tuple[str, int | None], torch.Tensor]  # (value, layer) → tensor


@torch.no_grad()
def _by_target(
    plan: Plan,
    sources: list[tuple[list[Place], Combine]],
    by_place: dict[Place, torch.Tensor],
    slope_of: dict[Place, torch.Tensor],
    rows: int,
    device: str | torch.device,
) -> tuple[By, By]:
    """Values and gradients of what was asked for, from those of the places it is made of."""
    values: By = {}
    gradients: By = {}
    for target, (places, pull) in zip(plan.targets, sources, strict=True):
        key = (target.value.name, target.layer)
        values[key] = target.combine([by_place[plan.reads[p]] for p in target.parts]).to(device)
        gradients[key] = pull([slope_of[p] for p in places]).to(device)
        if values[key].dim() < target.value.axes:  # batch and positions in one axis
            values[key], gradients[key] = (t.unflatten(0, (rows, -1)) for t in (values[key], gradients[key]))
    return values, gradients


def _differentiated(
    metric: Callable[[torch.Tensor], torch.Tensor],
    logits: torch.Tensor,
    seen: list[torch.Tensor],
    wanted: list[int],
    names: list[str],
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """The score, the logits, the gradients with respect to what is wanted of what was seen, and all that was seen."""
    score = metric(logits)
    if not isinstance(score, torch.Tensor) or score.numel() != 1:
        got = list(score.shape) if isinstance(score, torch.Tensor) else type(score).__name__
        raise ValueError(f"The metric must make one number of the logits {list(logits.shape)}; it made {got}.")
    if not score.requires_grad:
        raise ValueError(
            "The metric does not depend on any of the values through differentiable operations: it was detached, "
            "computed under no_grad, or made of integers (argmax, comparisons)."
        )
    frozen = [i for i in wanted if not seen[i].requires_grad]
    if frozen:
        raise ValueError(
            f"{names[frozen[0]]} does not require a gradient: its dtype is {seen[frozen[0]].dtype}, or the weights "
            "before it are frozen; for the latter, ask for token_embeddings as well, where the graph can begin."
        )
    made = torch.autograd.grad(score.reshape(()), [seen[i] for i in wanted], allow_unused=True)
    slopes = [torch.zeros_like(seen[i]) if g is None else g for i, g in zip(wanted, made, strict=True)]
    return score.detach(), logits.detach(), slopes, [tensor.detach() for tensor in seen]
