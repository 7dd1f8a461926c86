"""nnterp: one interface to the inside of any HuggingFace causal language model."""

from pkgutil import extend_path

__path__ = extend_path(__path__, __name__)

from loguru import logger as _logger

_logger.disable("nnterp")

from nnterp import _siblings  # noqa: E402
from nnterp.anatomy import Anatomy, RenameConfig, get_rename_dict  # noqa: E402
from nnterp.attaching import attach, detach  # noqa: E402
from nnterp.certificate import Certificate  # noqa: E402
from nnterp.collection import SparseFeatures, collect_features  # noqa: E402
from nnterp.datasets import ActivationDataset  # noqa: E402
from nnterp.dictionaries import (  # noqa: E402
    CrossLayerTranscoder,
    Dictionary,
    load_dictionary,
    load_transcoders,
    save_dictionary,
    toy_dictionary,
)
from nnterp.module_accessor import ModuleAccessor  # noqa: E402
from nnterp.rows import EncoderDecoderPrompt  # noqa: E402
from nnterp.standardized_transformer import StandardizedTransformer  # noqa: E402
from nnterp.toy import toy_checkpoint  # noqa: E402
from nnterp.traced import Condition  # noqa: E402

_siblings.explain_missing()

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
