"""`ModuleAccessor.nn_model`: a model's modules under the standard names, as nnsight shows them."""

from __future__ import annotations

from nnsight import NNsight
from torch import nn

from nnterp.anatomy import Anatomy
from nnterp.older._backbone import bind_backbone
from nnterp.traced import bind_names


class FoundModules(NNsight):
    """nnsight's tree over a module, with the standard names that its anatomy gives."""

    def __init__(self, module: nn.Module, anatomy: Anatomy) -> None:
        NNsight.__init__(self, module)
        bind_names(self, anatomy.names(), tuple(layer.path for layer in anatomy.blocks))
        bind_backbone(self, anatomy)
