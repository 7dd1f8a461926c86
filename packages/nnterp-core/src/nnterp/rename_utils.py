"""The 1.x address of what is in `nnterp.anatomy` and `nnterp.errors`."""

from nnterp.anatomy import AttnProbFunction, RenameConfig, get_rename_dict
from nnterp.errors import RenamingError

__all__ = ["AttnProbFunction", "RenameConfig", "RenamingError", "get_rename_dict"]
