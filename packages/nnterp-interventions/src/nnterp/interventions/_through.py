"""What a patchscope writes, and where: each layer's own state, or through a lens its image after a later layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from nnterp.indices import Indices
from nnterp.inputs import Row
from nnterp.interventions._fitted import Lens
from nnterp.interventions._layers import layers_of
from nnterp.interventions._targets import require_last_token

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer


def source_layers(model: StandardizedTransformer, layers: Indices, lens: Lens | None) -> list[int]:
    """The layers whose states are taken; all if None, or all that the lens has a map for.

    Raises:
        TypeError: `lens` is no lens.
        IndexError: There is no such layer.
    """
    if lens is not None and not isinstance(lens, Lens):
        raise TypeError(f"lens is a Lens, as fit_jacobian_lens() returns it, not {lens!r:.80}.")
    return layers_of(model, lens.layers if lens is not None and layers is None else layers)


def require_lens(
    model: StandardizedTransformer,
    lens: Lens | None,
    layers: Sequence[int],
    targets: Sequence[Row],
    at: Sequence[tuple[int, ...]],
    remote: bool,
) -> None:
    """Raise if a lens does not serve the model, the layers, or the places in the target prompts; None always does.

    Raises:
        ValueError: It is of another model, or leads to the last layer while an earlier token is patched.
        KeyError: It has no map for a layer.
    """
    if lens is None:
        return
    model.prepare(remote)
    lens.check(model)
    lens.maps_for(layers)
    if lens.maps_to == model.num_layers - 1:
        require_last_token(targets, at)


def written_states(lens: Lens | None, states: torch.Tensor, layers: Sequence[int]) -> tuple[torch.Tensor, list[int]]:
    """What is written, `[layers, sources, hidden]`, and the layer after which each is written."""
    if lens is None:
        return states, list(layers)
    through = [lens.apply(own, layer) for own, layer in zip(states, layers, strict=True)]
    return torch.stack(through), [lens.maps_to] * len(layers)
