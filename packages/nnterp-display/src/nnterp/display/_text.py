"""Texts for labels of plotly figures, escaped because plotly reads HTML and LaTeX in every label."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

from nnterp.token_text import TokenNames, visible


def escape(text: str) -> str:
    """Escape a text for a label of a plotly figure, so that it shows as it is.

    Plotly reads a subset of HTML, entities and (where MathJax is loaded) LaTeX in every label. Text with right-to-left
    letters is put between Unicode isolates, so that it does not reorder the numbers next to it.
    """
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("$", "&#36;")
    if any(unicodedata.bidirectional(char) in {"R", "AL"} for char in text):
        text = f"\u2068{text}\u2069"
    return text


def escape_lines(text: str) -> str:
    """`escape` each line, and turn line breaks into `<br>`."""
    return "<br>".join(escape(line) for line in text.split("\n"))


def as_names(tokens: Sequence[Any] | Any, tokenizer: Any = None) -> list[str]:
    """Visible labels of tokens given as texts, or as ids (a list or a tensor `[tokens]`), which the tokenizer names."""
    if hasattr(tokens, "tolist"):
        tokens = tokens.tolist()
    names = TokenNames(tokenizer)
    return [visible(token) if isinstance(token, str) else names(token) for token in tokens]
