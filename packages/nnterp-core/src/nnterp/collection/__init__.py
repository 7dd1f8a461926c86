"""Values of many prompts as plain tensors, in one pass; and the gradients of a metric with respect to them."""

from nnterp.collection._collect import collect
from nnterp.collection._collected import Collected
from nnterp.collection._differentiation import GradientReads, gradients_at, note
from nnterp.collection._gradients import Gradients, gradients
from nnterp.collection._sparse import SparseFeatures, collect_features

__all__ = [
    "Collected",
    "GradientReads",
    "Gradients",
    "SparseFeatures",
    "collect",
    "collect_features",
    "gradients",
    "gradients_at",
    "note",
]
