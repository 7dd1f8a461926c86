"""Gradients of a scalar with respect to values of the table (now in `nnterp.collection`)."""

from nnterp.collection import Gradients, gradients

__all__ = ["Gradients", "gradients"]
