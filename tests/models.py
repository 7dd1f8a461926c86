"""Tiny random models that the tests of one process share: each is built and proven once. Leave them as they are."""

from __future__ import annotations

from functools import cache

from nnterp import StandardizedTransformer
from nnterp.testing import tiny_model, tiny_tokenizer


@cache
def tiny(model_type: str) -> StandardizedTransformer:
    """The default tiny model of a type."""
    return StandardizedTransformer(tiny_model(model_type), tokenizer=tiny_tokenizer())


@cache
def eager(model_type: str) -> StandardizedTransformer:
    """The default tiny model of a type, with attention computed eagerly."""
    return StandardizedTransformer(tiny_model(model_type), tokenizer=tiny_tokenizer(), enable_attention_probs=True)
