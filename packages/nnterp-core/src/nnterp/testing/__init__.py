"""For tests of nnterp and of libraries on top of it, without network: tiny random models, a tokenizer, a remote worker.

>>> from nnterp.testing import model_types, tiny_model, tiny_tokenizer
>>> model, tokenizer = tiny_model("gemma2"), tiny_tokenizer()
>>> model(**tokenizer("The capital of France is", return_tensors="pt")).logits.shape
torch.Size([1, 5, 509])
"""

from nnterp.tiny import (
    CACHE_INEXACT,
    LEFT_PADDING_INEXACT,
    NO_CACHE,
    NOT_CAUSAL,
    NOT_RELOADABLE,
    POSITION_IDS_NEEDED,
    POSITION_IDS_OFFSET,
    encoder_decoder_types,
    image_model_types,
    model_types,
    model_types_without_images,
    multimodal_model_types,
    tiny_checkpoint,
    tiny_encoder_decoder,
    tiny_image_inputs,
    tiny_model,
    tiny_tokenizer,
    unavailable_model_types,
)

from ._remote import RemoteWorker, Request

__all__ = [
    "CACHE_INEXACT",
    "LEFT_PADDING_INEXACT",
    "NOT_CAUSAL",
    "NOT_RELOADABLE",
    "NO_CACHE",
    "POSITION_IDS_NEEDED",
    "POSITION_IDS_OFFSET",
    "RemoteWorker",
    "Request",
    "encoder_decoder_types",
    "image_model_types",
    "model_types",
    "model_types_without_images",
    "multimodal_model_types",
    "tiny_checkpoint",
    "tiny_encoder_decoder",
    "tiny_image_inputs",
    "tiny_model",
    "tiny_tokenizer",
    "unavailable_model_types",
]
