"""Activation steering (Turner et al., 2023; Rimsky et al., 2024)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer


def steer(
    model: StandardizedTransformer,
    layers: int | list[int],
    steering_vector: torch.Tensor,
    factor: float = 1,
    positions: Any = None,
    token_positions: Any = None,
    batch_index: Any = None,
) -> None:
    """Add `factor * steering_vector` to the residual stream leaving each of `layers`, inside a trace.

    `model.steer` as a function; see `nnterp.StandardizedTransformer.steer` for the arguments and errors.
    """
    model.steer(
        layers,
        steering_vector,
        factor=factor,
        positions=positions,
        token_positions=token_positions,
        batch_index=batch_index,
    )
