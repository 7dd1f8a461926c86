"""Find which module of a HuggingFace model plays which part, from its structure alone, before any forward pass."""

from nnterp.anatomy._anatomy import Anatomy, Layer, Part, cross_layers
from nnterp.anatomy._find import find_anatomy
from nnterp.anatomy._modules import sublayers
from nnterp.anatomy._rename import AttnProbFunction, RenameConfig, get_rename_dict
from nnterp.anatomy._sizes import Sizes, head_width, read_sizes

__all__ = [
    "Anatomy",
    "AttnProbFunction",
    "Layer",
    "Part",
    "RenameConfig",
    "Sizes",
    "cross_layers",
    "find_anatomy",
    "get_rename_dict",
    "head_width",
    "read_sizes",
    "sublayers",
]
