"""Prompts as token ids: encoded once, batched by length, given back in the user's order."""

from nnterp.inputs._batches import (
    batches,
    by_length,
    forward_flags,
    left_padded,
    pad,
    require_tokens,
    sharing_first,
    sharing_side,
)
from nnterp.inputs._encode import (
    Prompt,
    all_images,
    as_given,
    both_inputs,
    context_length,
    encode,
    encode_each,
    read_each,
    tokenized,
)
from nnterp.inputs._kinds import as_prompts, is_pair, token_ids, without_places
from nnterp.inputs._rows import Batch, EncoderDecoderPrompt, Reader, Row, given

__all__ = [
    "Batch",
    "EncoderDecoderPrompt",
    "Prompt",
    "Reader",
    "Row",
    "all_images",
    "as_given",
    "as_prompts",
    "batches",
    "both_inputs",
    "by_length",
    "context_length",
    "encode",
    "encode_each",
    "forward_flags",
    "given",
    "is_pair",
    "left_padded",
    "pad",
    "read_each",
    "require_tokens",
    "sharing_first",
    "sharing_side",
    "token_ids",
    "tokenized",
    "without_places",
]
