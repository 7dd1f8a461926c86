"""Activation steering (Turner et al., 2023; Rimsky et al., 2024)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nnterp.interventions._vectors import SteeringVector

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer


def steer(
    model: StandardizedTransformer,
    layers: Any,
    steering_vector: Any,
    factor: float = 1,
    positions: Any = None,
    token_positions: Any = None,
    batch_index: Any = None,
    steps: Any = None,
    mode: str = "add",
    keep_norm: bool = False,
    origin: Any = None,
) -> None:
    """Add `factor * steering_vector` to the residual stream leaving each of `layers`, inside a trace or a generation.

    `model.steer` as a function; see `nnterp.StandardizedTransformer.steer` for the arguments and errors. A
    `SteeringVector` of another model raises ValueError.

    Example:
        with torch.no_grad(), model.trace("The weather today is"):
            steer(model, layers=[2, 3], steering_vector=torch.ones(model.hidden_size), factor=0.5)
            logits = model.logits.save()  # [batch, seq, vocab]
    """
    if isinstance(steering_vector, SteeringVector):
        steering_vector.check(model)
    model.steer(
        layers,
        steering_vector,
        factor=factor,
        positions=positions,
        token_positions=token_positions,
        batch_index=batch_index,
        steps=steps,
        mode=mode,
        keep_norm=keep_norm,
        origin=origin,
    )
