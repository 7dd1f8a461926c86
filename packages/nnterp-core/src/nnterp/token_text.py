"""Tokens as their exact text: nothing invisible, nothing ambiguous."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

_MARKS = {" ": "·", "\n": "↵", "\t": "⇥"}
_RESERVED = frozenset({*_MARKS.values(), "⟨", "⟩", "◌"})
_LONE_BYTE, _NAMED_BYTE = re.compile("[\udc80-\udcff]"), re.compile("⟨([89A-F][0-9A-F])⟩")
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def visible(text: str) -> str:
    """A text with everything in it visible: tokens that differ in white space or hidden characters look different.

    A space is shown as `·`, a newline as `↵`, a tab as `⇥`; other white space, control and
    format characters (zero-width, right-to-left overrides) and the marks just named, where the text itself holds them,
    as their code point `⟨U+00A0⟩`; a combining mark with nothing to combine with stands on `◌`. A byte that is no part
    of a UTF-8 character, which Python's "surrogateescape" keeps as a lone surrogate, is shown as that byte: `⟨E2⟩`.

    Args:
        text: Any text, lone surrogates included.

    Returns:
        The text to show, `⟨empty⟩` for an empty one. For HTML it has to be escaped still.

    Example:
        print(display.visible(" a\\n"))  # → ·a↵
    """
    if not text:
        return "⟨empty⟩"
    pieces: list[str] = []
    for i, char in enumerate(text):
        if char in _MARKS:
            pieces.append(_MARKS[char])
        elif "\udc80" <= char <= "\udcff":
            pieces.append(f"⟨{ord(char) - 0xDC00:02X}⟩")
        elif char in _RESERVED or unicodedata.category(char) in {"Cc", "Cf", "Cs", "Co", "Cn", "Zs", "Zl", "Zp"}:
            pieces.append(f"⟨U+{ord(char):04X}⟩")
        elif unicodedata.combining(char) and (i == 0 or text[i - 1].isspace()):
            pieces.append(f"◌{char}")
        else:
            pieces.append(char)
    return "".join(pieces)


def visible_bytes(raw: bytes) -> str:
    """Bytes as `visible` text, each byte that is no part of a UTF-8 character as `⟨E2⟩`."""
    return visible(raw.decode("utf-8", errors="surrogateescape"))


def with_bytes_named(text: str) -> str:
    """A text whose lone surrogates, bytes that are part of a character, are written out: `⟨E2⟩`, as `visible` does."""
    return _LONE_BYTE.sub(lambda found: visible(found[0]), text)


def with_bytes_kept(text: str) -> str:
    """A text of `with_bytes_named` with lone surrogates again, as Python's "surrogateescape" keeps bytes."""
    return _NAMED_BYTE.sub(lambda found: chr(0xDC00 + int(found[1], 16)), text)


def width(text: str) -> int:
    """Columns of a text in a monospaced font: 2 for wide characters (CJK, emoji), 0 for combining marks."""
    return sum(
        0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in {"W", "F"} else 1
        for char in text
    )


def shorten(text: str, columns: int) -> str:
    """A text cut to at most `columns`, the cut shown as `…`."""
    if width(text) <= columns:
        return text
    kept, used = [], 1
    for char in text:
        used += width(char)
        if used > columns:
            break
        kept.append(char)
    return "".join(kept) + "…"


class TokenNames:
    """Token ids as visible text, for one tokenizer.

    Args:
        tokenizer: A transformers tokenizer of any kind, or None to show ids.

    Example:
        names = display.TokenNames(model.tokenizer)
        print(names.many(model.tokenizer("The capital").input_ids))
    """

    def __init__(self, tokenizer: Any = None) -> None:
        self.tokenizer = tokenizer
        if tokenizer is None:
            return
        if not hasattr(tokenizer, "convert_ids_to_tokens"):
            raise TypeError(f"A tokenizer was expected, such as model.tokenizer, not {tokenizer!r:.80}.")
        self.byte_of = _byte_decoder(tokenizer)
        self.verbatim = _added_tokens(tokenizer)

    def __call__(self, token: int) -> str:
        """The visible text of one id; an id the tokenizer has no token for is shown as `⟨id 50300⟩`."""
        raw = self.raw(token)
        if raw is None:
            return f"⟨id {int(token)}⟩"
        return visible_bytes(raw) if isinstance(raw, bytes) else visible(raw)

    def raw(self, token: int) -> str | bytes | None:
        """Say what one id stands for; returns its bytes if the tokenizer says them, else its text; None for an unknown
        id.
        """
        token = int(token)
        if self.tokenizer is None:
            return None
        if token in self.verbatim:
            return self.verbatim[token]
        try:
            piece = self.tokenizer.convert_ids_to_tokens(token)
        except (IndexError, KeyError, ValueError, OverflowError):
            piece = None
        if piece is None or isinstance(piece, bytes):
            return piece
        if self.byte_of is not None and all(char in self.byte_of for char in piece):
            return bytes(self.byte_of[char] for char in piece)
        if match := _BYTE_PIECE.fullmatch(piece):
            return bytes([int(match[1], 16)])
        return str(piece.replace("▁", " "))

    def many(self, tokens: Iterable[int]) -> list[str]:
        """Name several ids; returns the visible text of each."""
        return [self(token) for token in tokens]


@lru_cache(maxsize=1)
def _gpt2_alphabet() -> dict[str, int]:
    """The characters that byte-level BPE writes bytes as (Radford et al. 2019, released code)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in printable)
    alphabet.update({chr(0x100 + i): byte for i, byte in enumerate(others)})
    return alphabet


def _byte_decoder(tokenizer: Any) -> dict[str, int] | None:
    """Character → byte for byte-level tokenizers, None for the others."""
    own = getattr(tokenizer, "byte_decoder", None)
    if isinstance(own, dict) and own:
        return own
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and "ByteLevel" in repr(getattr(backend, "decoder", None)):
        return _gpt2_alphabet()
    return None


def _added_tokens(tokenizer: Any) -> dict[int, str]:
    """Special and added tokens, whose text is stored as it is."""
    added = getattr(tokenizer, "added_tokens_decoder", None) or {}
    return {int(token): getattr(content, "content", str(content)) for token, content in added.items()}
