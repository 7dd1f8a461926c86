"""Texts for plotly, which takes a subset of HTML, entities and LaTeX in every label for markup."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

from nnterp.token_text import TokenNames, visible


def escape(text: str) -> str:
    """A text for plotly, which reads a subset of HTML, entities and (where MathJax is loaded) LaTeX in every label.

    Right-to-left text is isolated, so that the numbers beside it stay beside it.
    """
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("$", "&#36;")
    if any(unicodedata.bidirectional(char) in {"R", "AL"} for char in text):
        text = f"\u2068{text}\u2069"
    return text


def escape_lines(text: str) -> str:
    """`escape`, with the line breaks kept."""
    return "<br>".join(escape(line) for line in text.split("\n"))


def as_names(tokens: Sequence[Any] | Any, tokenizer: Any = None) -> list[str]:
    """Labels for tokens given as ids (list or 1-d tensor, with the tokenizer) or as plain texts."""
    if hasattr(tokens, "tolist"):
        tokens = tokens.tolist()
    names = TokenNames(tokenizer)
    return [visible(token) if isinstance(token, str) else names(token) for token in tokens]
