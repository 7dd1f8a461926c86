"""Errors and warnings about prompts and targets."""

from __future__ import annotations


class TokenizationError(ValueError):
    """A word has no token to track: it is empty, or the tokenizer does not know it."""


class CollisionError(ValueError):
    """`distinct=True` was passed, and two categories share a token (or an answer)."""


class MissingScoresWarning(UserWarning):
    """Prompts have no score, because the model's logits or a function's probabilities are NaN or infinite."""


class SharedTokenWarning(UserWarning):
    """Different words begin with the same token, so the model's next token cannot tell them apart."""
