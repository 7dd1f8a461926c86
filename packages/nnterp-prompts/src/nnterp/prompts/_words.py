"""The words of a category, and how shared tokens are described in messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nnterp.prompts._tokens import token_name


def as_words(category: str, answers: Any) -> list[str]:
    """Return the answers of one category as a list of words.

    Raises:
        ValueError: There are none.
        TypeError: An answer is not a text.
    """
    words = [answers] if isinstance(answers, str) else list(answers)
    if not words:
        raise ValueError(f"The target {category!r} is empty: give it at least one word.")
    if not all(isinstance(word, str) for word in words):
        raise TypeError(f"The target {category!r} holds {words!r:.80}; words are texts.")
    return words


def collision_text(shared: Mapping[int, Sequence[str]], tokenizer: Any) -> str:
    """Say which categories share which tokens, as in "'a', 'b' share 'Paris' (40)"."""
    return "; ".join(
        f"{', '.join(map(repr, names))} share {token_name(tokenizer, token)}" for token, names in shared.items()
    )
