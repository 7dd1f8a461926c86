"""Makers of tiny random models of every causal LM architecture, of their configurations and of a tokenizer for them.

`nnterp.testing` shows them to users, `nnterp.twin` builds its narrow models with them. They import nothing else of
nnterp.
"""

from ._facts import (
    CACHE_INEXACT,
    LEFT_PADDING_INEXACT,
    NO_CACHE,
    NOT_CAUSAL,
    NOT_RELOADABLE,
    POSITION_IDS_NEEDED,
    POSITION_IDS_OFFSET,
)
from ._image_inputs import tiny_image_inputs
from ._loud import make_loud
from ._narrow import narrow_config
from ._shrink import tiny_config
from ._tokenizer import tiny_tokenizer
from ._zoo import (
    encoder_decoder_types,
    image_model_types,
    model_types,
    model_types_without_images,
    multimodal_model_types,
    tiny_checkpoint,
    tiny_encoder_decoder,
    tiny_model,
    unavailable_model_types,
)

__all__ = [
    "CACHE_INEXACT",
    "LEFT_PADDING_INEXACT",
    "NOT_CAUSAL",
    "NOT_RELOADABLE",
    "NO_CACHE",
    "POSITION_IDS_NEEDED",
    "POSITION_IDS_OFFSET",
    "encoder_decoder_types",
    "image_model_types",
    "make_loud",
    "model_types",
    "model_types_without_images",
    "multimodal_model_types",
    "narrow_config",
    "tiny_checkpoint",
    "tiny_config",
    "tiny_encoder_decoder",
    "tiny_image_inputs",
    "tiny_model",
    "tiny_tokenizer",
    "unavailable_model_types",
]
