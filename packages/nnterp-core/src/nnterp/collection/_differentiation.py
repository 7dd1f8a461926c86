"""Values of one forward pass and the gradients with respect to them: where both are read, and how they are made."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeAlias

import torch
from torch.autograd.graph import GradientEdge

from nnterp.collection._outputs import Index, label_of
from nnterp.discovery import require_gradients, require_passes_with_gradients
from nnterp.named_transformer import NamedTransformer
from nnterp.traced import Place
from nnterp.values import Combine, gradient_factors, gradient_reads, reads, when

ValueKey: TypeAlias = tuple[str, Index | None]  # name and layer of a value; None for a value that is not per layer
ByKey: TypeAlias = dict[ValueKey, torch.Tensor]


class GradientReads:
    """Where to read values, and what the gradients with respect to them are made of, in forward order.

    In a trace, read `places` in order and `note` what was read; then come `gradients_at` and `combined`.

    Args:
        model: The model.
        keys: Names and layers of values.
        slopes: Those of them whose gradients are wanted; all if None.

    Attributes:
        places: Where to read, in the order in which the model computes.
        names: What errors call them.
        wanted: Indices of the places whose gradients are needed.

    Raises:
        Unavailable: The model does not have a value, or no gradient with respect to it can be had.
    """

    def __init__(self, model: NamedTransformer, keys: Iterable[ValueKey], slopes: Iterable[ValueKey] | None = None):
        if model.dispatched:
            require_gradients(model._module)
            require_passes_with_gradients(model._module, model.anatomy)
        once = list(dict.fromkeys(keys))
        self._values: dict[ValueKey, tuple[list[Place], Combine]] = {}
        self._slopes: dict[ValueKey, tuple[list[Place], Combine]] = {}
        self._factors: dict[ValueKey, list[Place]] = {}
        for key in once:
            self._values[key] = reads(model, model.place(*key))
        for key in once if slopes is None else dict.fromkeys(slopes):
            self._slopes[key] = gradient_reads(model, model.place(*key), key_label(key))
            self._factors[key] = gradient_factors(model.place(*key))
        every = [place for places, _ in (*self._values.values(), *self._slopes.values()) for place in places]
        every += [place for places in self._factors.values() for place in places]
        self.places = sorted(set(every), key=lambda place: when(model, place))
        self.names = [str(place) for place in self.places]
        self.wanted = sorted({self.places.index(place) for places, _ in self._slopes.values() for place in places})

    @torch.no_grad()
    def combined(self, kept: Sequence[torch.Tensor], slopes: Sequence[torch.Tensor]) -> tuple[ByKey, ByKey]:
        """Combine what was read into values and gradients.

        Args:
            kept: Copies of what was read at `places`.
            slopes: The gradients with respect to those that are `wanted`.

        Returns:
            Values, and gradients with respect to them, each by name and layer; detached.
        """
        values = dict(zip(self.places, kept, strict=True))
        by_place = {self.places[i]: slope for i, slope in zip(self.wanted, slopes, strict=True)}
        return (
            {key: combine([values[p] for p in places]) for key, (places, combine) in self._values.items()},
            {
                key: combine([*(by_place[p] for p in places), *(values[p] for p in self._factors[key])])
                for key, (places, combine) in self._slopes.items()
            },
        )


def key_label(key: ValueKey) -> str:
    """How errors call a value: "layers_output[3]"."""
    return label_of(*key)


def note(tensor: torch.Tensor, edges: list[GradientEdge | None], kept: list[torch.Tensor]) -> None:
    """Keep a tensor that was read, and where it stands in the graph, as both are now: a model may add to it in place.

    Args:
        tensor: What was read.
        edges: Gets its place in autograd's graph, None where it requires no gradient.
        kept: Gets a detached copy.
    """
    edges.append(torch.autograd.graph.get_gradient_edge(tensor) if tensor.requires_grad else None)
    kept.append(tensor.detach().clone())


def gradients_at(
    score: torch.Tensor,
    edges: Sequence[GradientEdge | None],
    kept: Sequence[torch.Tensor],
    wanted: Sequence[int],
    names: Sequence[str],
    again: bool = False,
) -> list[torch.Tensor]:
    """Differentiate a score with respect to some of the tensors read on the way to it.

    Args:
        score: One number.
        edges, kept: What `note` kept of the tensors.
        wanted: Indices of those whose gradients are wanted.
        names: What errors call the tensors.
        again: Keep the graph, to differentiate once more.

    Returns:
        The gradients, of the shape, dtype and device of their tensors; 0 where the score ignores one.

    Raises:
        ValueError: The score does not depend on them through differentiable operations, or one requires no gradient or
            is made of whole numbers.
    """
    if not score.requires_grad:
        raise ValueError(
            "The metric does not depend on any of the values through differentiable operations: it was detached, "
            "computed under no_grad, or made of integers (argmax, comparisons)."
        )
    whole = [i for i in wanted if not (kept[i].is_floating_point() or kept[i].is_complex())]
    if whole:
        raise ValueError(
            f"{names[whole[0]]} are whole numbers ({kept[whole[0]].dtype}), with respect to which nothing has a "
            "gradient. Ask for another value."
        )
    frozen = [i for i in wanted if edges[i] is None]
    if frozen:
        raise ValueError(
            f"{names[frozen[0]]} does not require a gradient: the weights before it are frozen. Ask for "
            "token_embeddings as well, where the graph can begin."
        )
    made = torch.autograd.grad(score.reshape(()), [edges[i] for i in wanted], retain_graph=again, allow_unused=True)
    return [torch.zeros_like(kept[i]) if g is None else g for i, g in zip(wanted, made, strict=True)]
