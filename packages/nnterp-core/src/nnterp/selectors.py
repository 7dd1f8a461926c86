"""Positions named by a piece of the prompt's text."""

from __future__ import annotations

from typing import Any

from nnterp.indices import integer, shown
from nnterp.record import Record


class TextSelector(Record):
    """The tokens of a piece of the prompt's text; make one with `at` or `last_of`."""

    def __init__(self, text: str, which: str, occurrence: int = 0) -> None:
        self.text, self.which, self.occurrence = text, which, occurrence

    def __repr__(self) -> str:
        later = "" if self.occurrence == 0 else f", {self.occurrence}"
        return f"{self.which}({self.text!r}{later})"


def at(text: str, occurrence: int = 0) -> TextSelector:
    """All tokens that overlap `text` in the prompt; `occurrence` picks among several, negative counts from the end.

    Raises:
        TypeError: The text is no text, or the occurrence no integer.
        ValueError: The text is empty.
    """
    return _selector(text, "at", occurrence)


def last_of(text: str, occurrence: int = 0) -> TextSelector:
    """The last token that overlaps `text` in the prompt; arguments and errors as of `at`."""
    return _selector(text, "last_of", occurrence)


def _selector(text: Any, which: str, occurrence: Any) -> TextSelector:
    if not isinstance(text, str):
        raise TypeError(f"{which}(text) is {shown(text)}; give the text to look for in the prompt.")
    if not text:
        raise ValueError(f"{which}(text) is empty; give the text to look for in the prompt.")
    return TextSelector(text, which, integer(occurrence, f"{which}(occurrence)"))


def overlapping(selector: TextSelector, text: str, spans: list[tuple[int, int]], label: str) -> tuple[int, ...]:
    """The tokens that a selector names; `spans` are the begin and end of each token in `text`."""
    starts = [i for i in range(len(text)) if text.startswith(selector.text, i)] if selector.text else []
    if not -len(starts) <= selector.occurrence < len(starts):
        raise ValueError(f"{selector}: {label} contains {selector.text!r} {len(starts)} times: {text!r}")
    begin = starts[selector.occurrence]
    end = begin + len(selector.text)
    tokens = [i for i, (a, b) in enumerate(spans) if a < end and b > begin and b > a]
    if not tokens:
        raise ValueError(f"{selector}: no token of {label} stands for that text: {text!r}")
    return tuple(tokens) if selector.which == "at" else (tokens[-1],)
