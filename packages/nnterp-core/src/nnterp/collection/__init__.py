"""Values of many prompts as plain tensors, in one pass."""

from nnterp.collection._collect import collect
from nnterp.collection._collected import Collected

__all__ = ["Collected", "collect"]
