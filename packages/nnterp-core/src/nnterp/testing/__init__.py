"""Tiny random models and a tokenizer for tests, of this package and of libraries built on it, without a network."""

from ._tokenizer import tiny_tokenizer
from ._zoo import model_types, tiny_checkpoint, tiny_model, unavailable_model_types

__all__ = ["model_types", "tiny_checkpoint", "tiny_model", "tiny_tokenizer", "unavailable_model_types"]
