"""Positions named by a piece of the prompt's text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from nnterp.indices import integer, shown
from nnterp.record import Record

_TOKENS = ("image_token_id", "image_token_index", "image_patch_id")


# Its code travels only with a selector that a block or a steering mentions.
class Selector(Record):
    """Positions that depend on the prompt."""

    def among(self, own: Any, row: int) -> tuple[int, ...]:
        """Where they stand among the tokens of a running row; `own` is a `Pass`.

        Raises:
            ValueError: The row has none.
        """
        raise NotImplementedError


class TextSelector(Selector):
    """The tokens of a piece of the prompt's text; make one with `at` or `last_of`."""

    def __init__(self, text: str, which: str, occurrence: int = 0) -> None:
        self.text, self.which, self.occurrence = text, which, occurrence

    def __repr__(self) -> str:
        later = "" if self.occurrence == 0 else f", {self.occurrence}"
        return f"{self.which}({self.text!r}{later})"

    def among(self, own: Any, row: int) -> tuple[int, ...]:
        """The tokens that overlap the text."""
        text, spans = own.text(row)
        return overlapping(self, text, spans, f"row {row}")


class ImageSelector(Selector):
    """The tokens of an image in the prompt; make one with `image`."""

    def __init__(self, number: int | None) -> None:
        self.number = number

    def __repr__(self) -> str:
        return "image()" if self.number is None else f"image({self.number})"

    def among(self, own: Any, row: int) -> tuple[int, ...]:
        """The tokens of the image."""
        return image_positions(own.ids(row), image_token_ids(own.model._module.config), self.number, f"row {row}")


def image(number: int | None = None) -> ImageSelector:
    """The tokens of all images in the prompt, or of one: the `number`-th run of image tokens next to each other.

    Negative numbers count from the last.

    Raises:
        TypeError: The number is no integer.

    Example:
        tiny = testing.tiny_model("llava", images=True)
        llava = StandardizedTransformer(tiny, tokenizer=testing.tiny_tokenizer())
        inputs = testing.tiny_image_inputs(tiny)  # as a processor gives them
        states = llava.collect(inputs, "layers_output", positions=positions.image())
    """
    return ImageSelector(None if number is None else integer(number, "image(number)"))


def at(text: str, occurrence: int = 0) -> TextSelector:
    """All tokens that overlap `text` in the prompt; `occurrence` picks among several, negative counts from the end.

    Raises:
        TypeError: The text is no text, or the occurrence no integer.
        ValueError: The text is empty.

    Example:
        acts = model.collect("The Eiffel Tower is in Paris", "layers_output[3]", positions=positions.at("Eiffel Tower"))
        print(list(acts["layers_output[3]"].shape))  # → [1, 2, 128]
    """
    return _selector(text, "at", occurrence)


def last_of(text: str, occurrence: int = 0) -> TextSelector:
    """The last token that overlaps `text` in the prompt; arguments and errors as of `at`.

    Example:
        where = positions.last_of("Eiffel Tower")
        acts = model.collect("The Eiffel Tower is in Paris", "layers_output[3]", positions=where)
        print(list(acts["layers_output[3]"].shape))  # → [1, 128]
    """
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


def image_token_ids(config: Any) -> frozenset[int]:
    """The ids of the tokens that stand for an image in a model's prompts, as its config states them."""
    found = (getattr(config, name, None) for name in _TOKENS)
    return frozenset(i for i in found if isinstance(i, int) and not isinstance(i, bool))


def image_positions(ids: Iterable[int], tokens: frozenset[int], number: int | None, label: str) -> tuple[int, ...]:
    """The positions of image tokens among token ids.

    Args:
        ids: Token ids of a prompt.
        tokens: Those that stand for images.
        number: Which run of image tokens next to each other, negative ones from the last; None for all.
        label: How errors call the prompt.

    Raises:
        ValueError: There is no image token, or no such run.
    """
    runs: list[list[int]] = []
    for i, token in enumerate(ids):
        if token in tokens:
            if runs and runs[-1][-1] == i - 1:
                runs[-1].append(i)
            else:
                runs.append([i])
    if not runs:
        named = f"no token {', '.join(map(str, sorted(tokens)))}" if tokens else "and its model no token for images"
        raise ValueError(f"image(): {label} has no image tokens ({named}): give a processor's output with an image.")
    if number is None:
        return tuple(i for run in runs for i in run)
    if not -len(runs) <= number < len(runs):
        raise ValueError(f"image({number}): {label} has {len(runs)} runs of image tokens, counted from 0.")
    return tuple(runs[number])
