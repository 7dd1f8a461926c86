"""Add a vector to the residual stream of the running forward pass (now in `nnterp.traced`)."""

from nnterp.traced import steer

__all__ = ["steer"]
