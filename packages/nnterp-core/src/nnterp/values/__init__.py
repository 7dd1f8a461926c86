"""Where every value of the table is served in one model, in which order, and what it is called elsewhere."""

from nnterp.table import VALUES, Label, Value, get_label, get_value
from nnterp.traced import LayerAccessor, ModuleListAccessor, Site, Sum, bare, layer_index, read_value, write_value
from nnterp.values._aliases import canonical
from nnterp.values._attached import Attachment, attached_of, features_of, spelled
from nnterp.values._directory import directory_of
from nnterp.values._explain import Support, explain, explain_context, source_of, support
from nnterp.values._images import layers_that_run
from nnterp.values._lookup import FINDERS, Known, find_place, leaves_inside, site_of
from nnterp.values._read_order import Combine, gradient_factors, gradient_reads, reads, when
from nnterp.values._runs import runs_of, unrolled
from nnterp.values._stacks import stack_depth

__all__ = [
    "FINDERS",
    "VALUES",
    "Attachment",
    "Combine",
    "Known",
    "Label",
    "LayerAccessor",
    "ModuleListAccessor",
    "Site",
    "Sum",
    "Support",
    "Value",
    "attached_of",
    "bare",
    "canonical",
    "directory_of",
    "explain",
    "explain_context",
    "features_of",
    "find_place",
    "get_label",
    "get_value",
    "gradient_factors",
    "gradient_reads",
    "layer_index",
    "layers_that_run",
    "leaves_inside",
    "read_value",
    "reads",
    "runs_of",
    "site_of",
    "source_of",
    "spelled",
    "stack_depth",
    "support",
    "unrolled",
    "when",
    "write_value",
]
