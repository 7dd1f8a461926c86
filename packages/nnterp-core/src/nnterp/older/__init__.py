"""The spellings of nnterp 1.x that a model has, apart from the code that new code uses."""

from nnterp.older._accessors import OlderLayerAccessor, OlderModuleListAccessor
from nnterp.older._backbone import bind_backbone
from nnterp.older._loading import module_of_class, with_older_names
from nnterp.older._model import OlderModel
from nnterp.older._modules import FoundModules

__all__ = [
    "FoundModules",
    "OlderLayerAccessor",
    "OlderModel",
    "OlderModuleListAccessor",
    "bind_backbone",
    "module_of_class",
    "with_older_names",
]
