"""Labelled results: named tensors whose axes carry labels, and the ways in which every reader reads them.

No other package is imported: a result is any object that has the attributes of `LabelledResult`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from nnterp.display._arrays import as_array
from nnterp.token_text import TokenNames, visible, visible_bytes


class LabelledResult(Protocol):
    """The attributes that figures read from a result; the results of `nnterp.interventions` have them.

    Some more are read if they are there: `tokens` (for each prompt, the text at each label of "positions", None past
    the prompt's end), `exact_tokens` (the same with bytes that are part of a character as lone surrogates),
    `vocabulary` (token id → text), `token_bytes` (token id → its bytes in hexadecimal, where its text is not exact) and
    `about` (a dict with the model's name and the call).
    """

    @property
    def tensors(self) -> Mapping[str, Any]:
        """The tensors by name; the first is what the result is about."""

    @property
    def axes(self) -> Mapping[str, Sequence[str]]:
        """For each tensor the names of its axes."""

    @property
    def labels(self) -> Mapping[str, Sequence[Any]]:
        """For each axis its labels."""


def is_numbers(given: Any) -> bool:
    """True for a tensor, an array or (nested) lists; False for a result object."""
    return hasattr(given, "__array__") or hasattr(given, "detach") or isinstance(given, (list, tuple))


def require_result(given: Any, figure: str) -> LabelledResult:
    """Return `given` if it has the attributes of a result.

    Raises:
        TypeError: It lacks one of them; the message names `figure`, the function that was called.
    """
    if not all(hasattr(given, name) for name in ("tensors", "axes", "labels")):
        raise TypeError(
            f"{figure}() draws tensors, or results with `tensors`, `axes` and `labels`; "
            f"it was given a {type(given).__name__}."
        )
    return given


def main_tensor(result: LabelledResult) -> str:
    """The name of the tensor that the result is about."""
    return next(iter(result.tensors))


def array_of(result: LabelledResult, name: str) -> np.ndarray:
    """The tensor called `name` as a float array."""
    return as_array(result.tensors[name], name, len(result.axes[name]))


def describe_tensors(result: LabelledResult) -> str:
    """Each tensor's name with the names of its axes, for error messages."""
    return "; ".join(f"{name} [{', '.join(result.axes[name])}]" for name in result.tensors)


def token_rows(result: LabelledResult) -> Sequence[Sequence[str | None]]:
    """For each prompt its texts at the labels of "positions", None past its end; empty if the result has no tokens.

    Bytes that are part of a character stand in a text as lone surrogates, which `visible` shows as these bytes.
    """
    return getattr(result, "exact_tokens", None) or getattr(result, "tokens", ()) or ()


def tokens_at(result: LabelledResult, prompt: int) -> list[str] | None:
    """The texts of one prompt at the labels of "positions", "" past its end; None if the result has no tokens."""
    rows = token_rows(result)
    if not rows:
        return None
    return [token or "" for token in rows[min(prompt, len(rows) - 1)]]


def token_namer(result: LabelledResult, tokenizer: Any) -> Callable[[int], str]:
    """A function from token id to visible text: through the tokenizer, or through the result's own vocabulary."""
    if tokenizer is not None:
        return TokenNames(tokenizer)
    exact = {int(token): bytes.fromhex(piece) for token, piece in (getattr(result, "token_bytes", None) or {}).items()}
    texts = {int(token): text for token, text in (getattr(result, "vocabulary", None) or {}).items()}
    unknown = TokenNames(None)

    def name(token: int) -> str:
        token = int(token)
        if token in exact:
            return visible_bytes(exact[token])
        return visible(texts[token]) if token in texts else unknown(token)

    return name


def input_names(result: LabelledResult, prompt: int, tokenizer: Any) -> list[str] | None:
    """The visible tokens of one prompt at the labels of "positions", "" past its end; None if the result has none.

    They are named from their ids if the result holds these (`input_ids`), else from their decoded texts.
    """
    if "input_ids" in result.tensors:
        rows = array_of(result, "input_ids").astype(int)
        name = token_namer(result, tokenizer)
        return [name(token) if token >= 0 else "" for token in rows[prompt].tolist()]
    texts = tokens_at(result, prompt)
    return None if texts is None else [visible(text) if text else "" for text in texts]


def about(result: LabelledResult) -> Mapping[str, Any]:
    """Model, function and arguments that made the result; empty if it does not say."""
    return getattr(result, "about", None) or {}


def arguments(result: LabelledResult) -> Mapping[str, Any]:
    """Arguments of the call that made the result; empty if it does not say."""
    return about(result).get("arguments", {})


def title_of(result: LabelledResult, what: str) -> str:
    """A title: `what` is shown, and the name of the model if the result has it."""
    model = str(about(result).get("model", "")).rstrip("/").rpartition("/")[2]
    return f"{what}, {model}" if model else what


def score_name(result: LabelledResult, name: str) -> str:
    """What the call says that its scores are, or the metric's name in words, or that of the tensor (for a lambda)."""
    metric = arguments(result).get("score", arguments(result).get("metric"))
    return str(metric).replace("_", " ") if isinstance(metric, str) and "<" not in metric else name.replace("_", " ")
