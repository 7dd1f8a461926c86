"""The cells of a patchscope table, from probabilities, from generated texts or from a patchscope result."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from nnterp.display._arrays import as_array, check_probabilities
from nnterp.display._results import is_numbers, pick, require_result, title_of, token_namer
from nnterp.token_text import TokenNames, shorten, visible, width

_NAME = 24  # longer token texts are cut
_FEW_LAYERS = 24  # up to so many layers a cell shows three tokens, with more layers one


@dataclass(frozen=True)
class PatchscopeCells:
    """What the table shows.

    Attributes:
        lines: `[sources][layers][lines]`, the lines of text in each cell.
        shades: `[sources, layers]`, the probability of each cell's first token; None for generated texts.
        sources, layers: Labels of the axes, None if unknown.
        title: A title, None if there is nothing to make it of.
    """

    lines: list[list[list[str]]]
    shades: np.ndarray | None
    sources: list[Any] | None = None
    layers: list[Any] | None = None
    title: str | None = None


def patchscope_cells(readings: Any, tokenizer: Any, top_k: int | None) -> PatchscopeCells:
    """The cells of what `plot_patchscope` was given.

    Raises:
        ValueError: They are no probabilities, or a source has more layers than another.
        TypeError: They are neither numbers, nor texts, nor a result.
    """
    if not is_numbers(readings):
        cells = _of_result(readings, tokenizer, top_k)
    elif _is_texts(readings):
        cells = PatchscopeCells([[_wrapped(text) for text in column] for column in readings], None)
    else:
        cells = _of_probabilities(readings, tokenizer, top_k)
    counts = [len(column) for column in cells.lines]
    if len(set(counts)) > 1:
        raise ValueError(f"Each source needs one reading per layer; they have {counts}.")
    return cells


def _is_texts(readings: Any) -> bool:
    """True for a non-empty list of non-empty lists of texts."""
    return (
        isinstance(readings, (list, tuple))
        and bool(readings)
        and all(
            isinstance(column, (list, tuple)) and column and all(isinstance(text, str) for text in column)
            for column in readings
        )
    )


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(visible(text).replace("·", " "), 36) or ["⟨empty⟩"]


def _of_probabilities(readings: Any, tokenizer: Any, top_k: int | None) -> PatchscopeCells:
    probs = as_array(readings, "readings ([sources, layers, vocab])", 2, 3)
    probs = probs[None] if probs.ndim == 2 else probs
    check_probabilities(probs, "readings")
    order = np.argsort(-probs, axis=-1, kind="stable")[..., : _shown_tokens(top_k, probs.shape[1])]
    names = TokenNames(tokenizer)
    texts = [[names.many(ids) for ids in column] for column in order]
    return _of_tokens(texts, np.take_along_axis(probs, order, -1))


def _of_result(readings: Any, tokenizer: Any, top_k: int | None) -> PatchscopeCells:
    result = require_result(readings, "plot_patchscope")
    if "top_ids" not in result.tensors:
        raise ValueError(f"This result has no top tokens; it has {', '.join(result.tensors)}. Make it with top_k=3.")
    axes = result.axes["top_ids"]
    down = next((axis for axis in ("sources", "prompts") if axis in axes), None)
    if down is None or "layers" not in axes:
        raise ValueError(f"top_ids has axes {', '.join(axes)}; a table of readings needs sources and layers.")
    ids = pick(result, "top_ids", {}, down, "layers", "top").values.astype(int)
    probabilities = pick(result, "top_probs", {}, down, "layers", "top").values
    name = token_namer(result, tokenizer)
    top_k = _shown_tokens(top_k, ids.shape[1])
    texts = [[[name(token) for token in cell[:top_k]] for cell in column] for column in ids]
    return replace(
        _of_tokens(texts, probabilities[..., :top_k]),
        sources=list(result.labels[down]),
        layers=list(result.labels["layers"]),
        title=title_of(result, "Patchscope"),
    )


def _shown_tokens(top_k: int | None, layers: int) -> int:
    """How many tokens a cell shows."""
    return (3 if layers <= _FEW_LAYERS else 1) if top_k is None else max(top_k, 1)


def _of_tokens(texts: Sequence[Sequence[Sequence[str]]], probabilities: np.ndarray) -> PatchscopeCells:
    """A line for each token and its probability, in aligned columns."""
    longest = max(width(shorten(text, _NAME)) for column in texts for cell in column for text in cell)
    lines = [
        [
            [
                f"{shorten(text, _NAME)}{' ' * (longest - width(shorten(text, _NAME)))} {value:.2f}"
                for text, value in zip(cell, values, strict=True)
            ]
            for cell, values in zip(column, numbers, strict=True)
        ]
        for column, numbers in zip(texts, probabilities, strict=True)
    ]
    return PatchscopeCells(lines, probabilities[..., 0])
