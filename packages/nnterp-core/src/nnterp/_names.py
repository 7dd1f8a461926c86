"""The public names of `nnterp`, which imports this module when one of them is first asked for."""

from nnterp.anatomy import Anatomy, RenameConfig, get_rename_dict
from nnterp.attaching import attach, detach
from nnterp.certificate import Certificate
from nnterp.collection import SparseFeatures, collect_features
from nnterp.datasets import ActivationDataset
from nnterp.dictionaries import (
    CrossLayerTranscoder,
    Dictionary,
    load_dictionary,
    load_transcoders,
    save_dictionary,
    toy_dictionary,
)
from nnterp.inputs import EncoderDecoderPrompt
from nnterp.module_accessor import ModuleAccessor
from nnterp.standardized_transformer import StandardizedTransformer
from nnterp.toy import toy_checkpoint
from nnterp.traced import Condition

__all__ = [
    "ActivationDataset",
    "Anatomy",
    "Certificate",
    "Condition",
    "CrossLayerTranscoder",
    "Dictionary",
    "EncoderDecoderPrompt",
    "ModuleAccessor",
    "RenameConfig",
    "SparseFeatures",
    "StandardizedTransformer",
    "attach",
    "collect_features",
    "detach",
    "get_rename_dict",
    "load_dictionary",
    "load_transcoders",
    "save_dictionary",
    "toy_checkpoint",
    "toy_dictionary",
]
