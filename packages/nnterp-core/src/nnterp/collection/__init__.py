"""Values of many prompts as plain tensors, in one pass; and the gradients of a metric with respect to them."""

from nnterp.collection._collect import collect, positions_of, resumed
from nnterp.collection._collected import Collected
from nnterp.collection._differentiation import GradientReads, gradients_at, note
from nnterp.collection._filling import Filling
from nnterp.collection._generated import Generated
from nnterp.collection._gradients import Gradients, gradients
from nnterp.collection._keys import read_key
from nnterp.collection._outputs import OUTPUTS, named, only
from nnterp.collection._pass import read_batch
from nnterp.collection._plan import Plan, Target, make_plan
from nnterp.collection._reduce import Reduce, check_reduce, checked
from nnterp.collection._select import pick
from nnterp.collection._sparse import SparseFeatures, collect_features

__all__ = [
    "OUTPUTS",
    "Collected",
    "Filling",
    "Generated",
    "GradientReads",
    "Gradients",
    "Plan",
    "Reduce",
    "SparseFeatures",
    "Target",
    "check_reduce",
    "checked",
    "collect",
    "collect_features",
    "gradients",
    "gradients_at",
    "make_plan",
    "named",
    "note",
    "only",
    "pick",
    "positions_of",
    "read_batch",
    "read_key",
    "resumed",
]
