"""Escape text for plotly, which interprets HTML tags, entities and LaTeX in every label."""

from __future__ import annotations

import unicodedata
from typing import Any

from nnterp.arguments import listed
from nnterp.indices import integer
from nnterp.token_text import TokenNames, visible


def escape(text: str) -> str:
    """Escape everything in a text that plotly would interpret: HTML tags, entities, and LaTeX between dollars.

    Right-to-left text is put between isolating characters, so that it does not move the text beside it.

    Returns:
        The text that plotly shows as the given one.

    Example:
        print(display.escape("<b>"))  # → &lt;b&gt;
    """
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("$", "&#36;")
    if any(unicodedata.bidirectional(char) in {"R", "AL"} for char in text):
        text = f"\u2068{text}\u2069"
    return text


def escape_lines(text: str) -> str:
    """`escape` a text of several lines; line breaks become `<br>`."""
    return "<br>".join(escape(line) for line in text.split("\n"))


def as_names(tokens: Any, tokenizer: Any = None) -> list[str]:
    """The visible text of each token; tokens are texts, or ids (a list or a 1-d tensor) that the tokenizer names."""
    if hasattr(tokens, "tolist"):
        tokens = tokens.tolist()
    names = TokenNames(tokenizer)
    given = listed(tokens, "tokens", "a list of texts or token ids")
    return [visible(token) if isinstance(token, str) else names(integer(token, "A token")) for token in given]
