"""Prompts as token ids: encoded once, batched by length, given back in the user's order."""

from nnterp.inputs._batches import batches, by_length, forward_flags, left_padded, pad, sharing_first
from nnterp.inputs._encode import Prompt, all_images, context_length, encode, encode_each, read_each, tokenized
from nnterp.inputs._kinds import as_prompts, is_pair, token_ids, without_places
from nnterp.inputs._rows import Batch, Reader, Row

__all__ = [
    "Batch",
    "Prompt",
    "Reader",
    "Row",
    "all_images",
    "as_prompts",
    "batches",
    "by_length",
    "context_length",
    "encode",
    "encode_each",
    "forward_flags",
    "is_pair",
    "left_padded",
    "pad",
    "read_each",
    "sharing_first",
    "token_ids",
    "tokenized",
    "without_places",
]
