"""Everything readable or writable in a forward pass: one row each, served by name."""

from nnterp.values._accessors import LayerAccessor, ModuleListAccessor, read_value, write_value
from nnterp.values._table import VALUES, Value, get_value

__all__ = ["VALUES", "LayerAccessor", "ModuleListAccessor", "Value", "get_value", "read_value", "write_value"]
