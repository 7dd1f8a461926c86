"""The contents of a logit-lens grid, cell by cell, and how they are computed from probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from nnterp.display._arrays import as_array, axis_labels, check_probabilities, check_same
from nnterp.display._text import as_names
from nnterp.indices import integers
from nnterp.token_text import TokenNames

Colour = Literal["probability", "rank", "entropy", "kl"]


@dataclass(frozen=True)
class LensCells:
    """What the grid shows at each layer and position.

    Attributes:
        tokens: `[layers][positions][k]`, visible texts, most probable first.
        probabilities: `[layers, positions, k]`, of these tokens.
        colour: `[layers, positions]`, the value that colours the cell.
        colour_name: Name of that value, with its unit.
        kind: Which of the values it is.
        layers, positions: Labels of the axes.
        inputs: The input token at each position, "" where it is not known.
        targets: For each column, the token whose probability or rank `colour` is; None if `colour` is the top
            token's probability, or an entropy.
        column_axis: Title of the axis of columns.
    """

    tokens: list[list[list[str]]]
    probabilities: np.ndarray
    colour: np.ndarray
    colour_name: str
    kind: Colour
    layers: list[str]
    positions: list[Any]
    inputs: list[str]
    targets: list[str] | None = None
    column_axis: str = "position (input token)"

    def take(self, rows: Sequence[int], columns: Sequence[int]) -> LensCells:
        """The cells of some rows and some columns, in that order."""
        return replace(
            self,
            tokens=[[self.tokens[i][j] for j in columns] for i in rows],
            probabilities=self.probabilities[np.ix_(rows, columns)],
            colour=self.colour[np.ix_(rows, columns)],
            layers=[self.layers[i] for i in rows],
            positions=[self.positions[j] for j in columns],
            inputs=[self.inputs[j] for j in columns],
            targets=None if self.targets is None else [self.targets[j] for j in columns],
        )


COLOUR_NAMES: dict[tuple[Colour, bool], str] = {
    ("probability", False): "probability of the top token",
    ("probability", True): "probability of the target",
    ("rank", True): "rank of the target (1 = top)",
    ("rank", False): "rank of layer {last}'s token (1 = top)",
    ("entropy", False): "entropy (nats)",
    ("kl", False): "KL from layer {last} (nats)",
}
"""Names of the colour bar, by kind and by whether the value is a target's."""


def colour_title(kind: Colour, targeted: bool, last: Any) -> str:
    """The name of the colour bar; `last` is the label of the last layer."""
    return COLOUR_NAMES[kind, targeted and kind in ("probability", "rank")].format(last=last)


def cells_of_probabilities(
    lens: Any,
    tokenizer: Any,
    *,
    tokens: Sequence[Any] | None,
    layers: Sequence[Any] | None,
    kind: Colour,
    target: Any,
    top_k: int,
) -> LensCells:
    """The cells of `[layers, positions, vocab]` (or `[layers, vocab]`) probabilities; arguments as in `plot_lens`.

    Raises:
        ValueError: These are no probabilities, labels do not fit their axis, or there is no such target.
    """
    probs = as_array(lens, "lens ([layers, positions, vocab])", 2, 3)
    probs = probs[:, None] if probs.ndim == 2 else probs
    check_probabilities(probs, "lens")
    num_layers, num_positions, vocab = probs.shape
    order = _top(probs, min(max(top_k, 1), vocab))
    names = TokenNames(tokenizer)
    inputs = [""] * num_positions if tokens is None else as_names(tokens, tokenizer)
    check_same("tokens", len(inputs), num_positions, "the position axis of lens")
    rows = axis_labels(layers, num_layers, "layers", "the layer axis of lens")
    colour, ids = _colour(probs, order[..., 0], _target_ids(target, num_positions, vocab), kind)
    return LensCells(
        tokens=[[names.many(cell) for cell in row] for row in order],
        probabilities=np.take_along_axis(probs, order, -1),
        colour=colour,
        colour_name=colour_title(kind, target is not None, rows[-1]),
        kind=kind,
        layers=rows,
        positions=list(range(num_positions)),
        inputs=inputs,
        targets=None if ids is None else names.many(ids),
    )


def _top(probs: np.ndarray, k: int) -> np.ndarray:
    """Ids of the `k` most probable tokens, most probable first."""
    if probs.shape[-1] <= 4096:
        return np.argsort(-probs, axis=-1, kind="stable")[..., :k]
    # Sorting a whole large vocabulary is slow.
    some = np.argpartition(-probs, k - 1, axis=-1)[..., :k]
    order = np.argsort(-np.take_along_axis(probs, some, -1), axis=-1, kind="stable")
    return np.take_along_axis(some, order, -1)


def _target_ids(target: Any, positions: int, vocab: int) -> np.ndarray | None:
    """One target id for each position, None if there is no target."""
    if target is None:
        return None
    ids = np.asarray(integers(target.reshape(-1) if hasattr(target, "reshape") else target, "target")).reshape(-1)
    ids = np.repeat(ids, positions) if ids.size == 1 else ids
    check_same("target", ids.size, positions, "the position axis of lens")
    if ids.min() < 0 or ids.max() >= vocab:
        raise ValueError(
            f"target {int(ids.max() if ids.max() >= vocab else ids.min())} is not in the vocabulary of {vocab}."
        )
    return ids


def _colour(
    probs: np.ndarray, top: np.ndarray, target: np.ndarray | None, kind: Colour
) -> tuple[np.ndarray, np.ndarray | None]:
    """The value that colours each cell, and for each position the token it belongs to (None: the top token).

    Args:
        probs: `[layers, positions, vocab]`.
        top: `[layers, positions]`, ids of the top tokens.
        target: `[positions]`, ids, or None.
        kind: Which value.
    """
    if kind == "entropy":
        return -(probs * np.log(np.where(probs > 0, probs, 1.0))).sum(-1), None
    if kind == "kl":
        share = probs[-1:]
        with np.errstate(divide="ignore", invalid="ignore"):
            apart = np.log(share) - np.log(probs)
        return np.where(share > 0, share * np.where(share > 0, apart, 0.0), 0.0).sum(-1), None
    if kind == "rank":
        target = top[-1] if target is None else target
        return (probs > _probability_of(probs, target)).sum(-1) + 1.0, target
    return _probability_of(probs, top if target is None else target)[..., 0], target


def _probability_of(probs: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """`[layers, positions, 1]`, the probability of one id for each cell, or for each position."""
    return np.take_along_axis(probs, np.broadcast_to(ids, probs.shape[:2])[..., None], -1)
