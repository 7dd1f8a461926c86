"""The words of a target, as a user gives them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def listed(words: Any, what: str) -> list[Any]:
    """Return a word, or several, as a list.

    Raises:
        TypeError: It is neither a text nor a list of something.
    """
    if isinstance(words, str):
        return [words]
    if isinstance(words, (bytes, bytearray, memoryview, Mapping)) or not isinstance(words, Iterable):
        raise TypeError(f"{what} is {words!r:.80} ({type(words).__name__}); give a text or a list of texts.")
    return list(words)


def as_words(category: str, answers: Any) -> list[str]:
    """Return the answers of one category as a list of words.

    Raises:
        ValueError: There are none.
        TypeError: An answer is not a text.
    """
    words = listed(answers, f"The target {category!r}")
    if not words:
        raise ValueError(f"The target {category!r} is empty: give it at least one word.")
    if not all(isinstance(word, str) for word in words):
        raise TypeError(f"The target {category!r} holds {words!r:.80}; words are texts.")
    return words
