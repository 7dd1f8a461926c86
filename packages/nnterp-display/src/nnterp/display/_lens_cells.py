"""The cells of a logit-lens grid, from probabilities or from a lens result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from nnterp.display._arrays import as_array, check_probabilities
from nnterp.display._grid import axis_labels, check_same
from nnterp.display._results import (
    LabelledResult,
    prompt_index,
    require_result,
    require_tensor,
    target_ids,
    tensor_of,
    title_of,
    token_namer,
    tokens_at,
)
from nnterp.display._text import as_names
from nnterp.token_text import TokenNames, visible

Colour = Literal["probability", "rank", "entropy"]

_COLOUR_NAMES: dict[tuple[str, bool], str] = {
    ("probability", False): "probability of the top token",
    ("probability", True): "probability of the target",
    ("rank", True): "rank of the target (1 = top)",
    ("rank", False): "rank of the last layer's token (1 = top)",
    ("entropy", False): "entropy (nats)",
}


@dataclass(frozen=True)
class LensCells:
    """Everything the grid shows, per layer and position.

    Attributes:
        tokens: `[layers][positions][k]`, visible texts, most probable first.
        probabilities: `[layers, positions, k]`.
        colour: `[layers, positions]`, what the cell is coloured by.
        colour_name: Name of that quantity, with its unit.
        kind: Which of the three quantities it is.
        layers, positions: Labels of the axes.
        inputs: The input token at each position.
        targets: Per position the token whose probability or rank `colour` is; None if that is the top token.
        column_axis: What the columns are.
    """

    tokens: list[list[list[str]]]
    probabilities: np.ndarray
    colour: np.ndarray
    colour_name: str
    kind: Colour
    layers: list[str]
    positions: list[int]
    inputs: list[str]
    targets: list[str] | None = None
    column_axis: str = "position (input token)"


def check_colour(kind: str) -> None:
    """Refuse a name that is none of the three quantities.

    Raises:
        ValueError: It is none of them.
    """
    if kind not in ("probability", "rank", "entropy"):
        raise ValueError(f"color must be 'probability', 'rank' or 'entropy', not {kind!r}.")


def cells_of_probabilities(
    lens: Any,
    tokenizer: Any,
    tokens: Sequence[Any] | None,
    layers: Sequence[Any] | None,
    kind: Colour,
    target: Any,
    top_k: int,
) -> LensCells:
    """The cells of probabilities `[layers, positions, vocab]`."""
    probs = as_array(lens, "lens ([layers, positions, vocab])", 2, 3)
    probs = probs[:, None] if probs.ndim == 2 else probs
    check_probabilities(probs, "lens")
    num_layers, num_positions, vocab = probs.shape
    order = _top(probs, min(max(top_k, 1), vocab))
    names = TokenNames(tokenizer)
    inputs = [""] * num_positions if tokens is None else as_names(tokens, tokenizer)
    check_same("tokens", len(inputs), num_positions, "the position axis of lens")
    rows = axis_labels("layers", layers, num_layers, "the layer axis of lens")
    targets = _target_ids(target, num_positions, vocab)
    check_colour(kind)
    if kind == "rank" and targets is None:
        targets = order[-1, :, 0]
    return LensCells(
        tokens=[[names.many(order[i, j]) for j in range(num_positions)] for i in range(num_layers)],
        probabilities=np.take_along_axis(probs, order, -1),
        colour=_colours(probs, kind, order[..., 0] if targets is None else np.tile(targets, (num_layers, 1))),
        colour_name=_COLOUR_NAMES[kind, target is not None and kind != "entropy"],
        kind=kind,
        layers=rows,
        positions=list(range(num_positions)),
        inputs=inputs,
        targets=None if targets is None or kind == "entropy" else names.many(targets),
    )


def _top(probs: np.ndarray, k: int) -> np.ndarray:
    """Indices of the `k` largest on the last axis, largest first; a large vocabulary is not sorted as a whole."""
    if probs.shape[-1] <= 4096:
        return np.argsort(-probs, axis=-1, kind="stable")[..., :k]
    some = np.argpartition(-probs, k - 1, axis=-1)[..., :k]
    order = np.argsort(-np.take_along_axis(probs, some, -1), axis=-1, kind="stable")
    return np.take_along_axis(some, order, -1)


def _target_ids(target: Any, positions: int, vocab: int) -> np.ndarray | None:
    """One target id per position, from one id or a list of them."""
    if target is None:
        return None
    ids = np.asarray(target.cpu() if hasattr(target, "cpu") else target, dtype=int).reshape(-1)
    ids = np.repeat(ids, positions) if ids.size == 1 else ids
    check_same("target", ids.size, positions, "the position axis of lens")
    if ids.min() < 0 or ids.max() >= vocab:
        raise ValueError(
            f"target {int(ids.max() if ids.max() >= vocab else ids.min())} is not in the vocabulary of {vocab}."
        )
    return ids


def _colours(probs: np.ndarray, kind: Colour, tokens: np.ndarray) -> np.ndarray:
    """Entropy of each cell, or the probability or rank of its token; all `[layers, positions]`."""
    if kind == "entropy":
        return -(probs * np.log(np.where(probs > 0, probs, 1.0))).sum(-1)
    own = np.take_along_axis(probs, tokens[..., None], -1)
    return (probs > own).sum(-1) + 1.0 if kind == "rank" else own[..., 0]


def cells_of_result(
    result: Any, tokenizer: Any, *, prompt: int, colour: Colour, top_k: int, target: int | None, layers: Any
) -> tuple[LensCells, str]:
    """The cells of a lens result with `top_probs` and `top_ids`, and a title."""
    check_colour(colour)
    grid = _ResultGrid(require_result(result, "plot_lens"), prompt)
    name = token_namer(result, tokenizer)
    ids = grid.take("top_ids")[:, :, :top_k]
    probabilities = grid.take("top_probs")[:, :, :top_k]
    values, targets = grid.colours(colour, target, name)
    cells = LensCells(
        tokens=[[[name(token) for token in cell] for cell in row] for row in ids.astype(int)],
        probabilities=probabilities,
        colour=probabilities[..., 0] if values is None else values,
        colour_name=_COLOUR_NAMES[colour, targets is not None],
        kind=colour,
        layers=[str(layer) for layer in (result.labels["layers"] if layers is None else layers)],
        positions=grid.positions,
        inputs=grid.inputs,
        targets=targets,
        column_axis="position (input token)" if grid.by_position else "prompt",
    )
    return cells, title_of(result, grid.title)


class _ResultGrid:
    """The columns of a lens result: the positions of one prompt, or one column per prompt if it has no positions."""

    def __init__(self, result: LabelledResult, prompt: int) -> None:
        if "top_ids" not in result.tensors:
            raise ValueError(
                f"This result has no top tokens to put in the cells; it has {', '.join(result.tensors)}. "
                f"Make it with top_k=5."
            )
        prompts = list(result.labels["prompts"])
        self.result = result
        self.prompt = prompt_index(prompts, prompt)
        self.by_position = "positions" in result.labels and "positions" in result.axes["top_ids"]
        self.columns: list[int]
        if self.by_position:
            tokens = tokens_at(result, self.prompt) or [""] * len(result.labels["positions"])
            self.columns = [i for i, token in enumerate(tokens) if token or not any(tokens)]
            self.inputs = [visible(tokens[i]) if tokens[i] else "" for i in self.columns]
            self.positions = [result.labels["positions"][i] for i in self.columns]
            self.title = f"Logit lens of {_quoted(prompts[self.prompt])}"
        else:
            self.columns = self.positions = list(range(len(prompts)))
            self.inputs = [str(text) for text in prompts]
            self.title = "Logit lens after each prompt"

    def take(self, name: str) -> np.ndarray:
        """One tensor as `[layers, columns, ...]`."""
        array = tensor_of(self.result, name)
        return (array[self.prompt] if self.by_position else np.swapaxes(array, 0, 1))[:, self.columns]

    def colours(
        self, colour: Colour, target: int | None, name: Callable[[int], str]
    ) -> tuple[np.ndarray | None, list[str] | None]:
        """Colours `[layers, columns]` (None: the probability of the top token), and per column the target's text."""
        if colour == "entropy":
            return self.take(require_tensor(self.result, "entropy", "entropy=True")), None
        if colour == "probability" and target is None:
            return None, None
        tensor = require_tensor(
            self.result, "target_ranks" if colour == "rank" else "target_probs", "targets=..., ranks=True"
        )
        owners = [self.prompt] * len(self.columns) if self.by_position else self.columns
        places = [_target_place(self.result, owner, target) for owner in owners]
        values = self.take(tensor)
        values = np.stack([values[:, i, place] for i, place in enumerate(places)], axis=1)
        ids = target_ids(self.result)
        texts = [name(ids[owner, place]) for owner, place in zip(owners, places, strict=True)]
        return values + 1.0 if colour == "rank" else values, texts


def _target_place(result: LabelledResult, prompt: int, target: int | None) -> int:
    """Index of a target in one prompt's own list of targets; the first if no target is named."""
    own = target_ids(result)[prompt].tolist()
    if target is None:
        return 0
    if target not in own:
        raise ValueError(f"Token {target} is not among the targets of prompt {prompt}: {[i for i in own if i >= 0]}.")
    return own.index(target)


def _quoted(text: Any) -> str:
    shown = visible(str(text)).replace("·", " ")
    return f"“{shown if len(shown) <= 60 else shown[:59] + '…'}”"
