"""Everything readable or writable in a forward pass: one row each, served by name."""

from nnterp.values._accessors import LayerAccessor, ModuleListAccessor, layer_index, read_value, write_value
from nnterp.values._aliases import canonical
from nnterp.values._explain import Support, explain, support
from nnterp.values._label import Label
from nnterp.values._mid import prepare
from nnterp.values._order import reads, when
from nnterp.values._places import Site, Sum
from nnterp.values._probabilities import AttentionProbabilitiesAccessor
from nnterp.values._table import VALUES, Value, get_label, get_value

__all__ = [
    "VALUES",
    "AttentionProbabilitiesAccessor",
    "Label",
    "LayerAccessor",
    "ModuleListAccessor",
    "Site",
    "Sum",
    "Support",
    "Value",
    "canonical",
    "explain",
    "get_label",
    "get_value",
    "layer_index",
    "prepare",
    "read_value",
    "reads",
    "support",
    "when",
    "write_value",
]
