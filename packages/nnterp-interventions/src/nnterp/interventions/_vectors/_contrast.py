"""Steering vectors from contrasts: mean differences, PCA of paired differences, classifiers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch

from nnterp.inputs import Row
from nnterp.interventions._vectors._belonging import identity_of
from nnterp.interventions._vectors._directions import hash_of, number
from nnterp.interventions._vectors._examples import read_labels, split_pairs, states_at
from nnterp.interventions._vectors._fitting import METHODS, direction, require_sklearn
from nnterp.interventions._vectors._vector import SteeringVector

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer

Method: TypeAlias = Literal["mean", "pca", "pca_center", "probe"]
States: TypeAlias = dict[int, torch.Tensor]


def steering_vectors(
    model: StandardizedTransformer,
    positive: Any,
    negative: Any = None,
    method: Method = "mean",
    layers: int | Iterable[int] | None = None,
    positions: Any = -1,
    *,
    labels: Any = None,
    norm: float | None = None,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool | None = None,
    remote: Any = False,
) -> SteeringVector:
    """A direction for each layer that leads from negative to positive prompts.

    Args:
        model: The model.
        positive, negative: Texts, token ids, chats, or lists of these, as in `model.collect`. Without `negative`,
            `positive` is a list of pairs `(positive, negative)`, a tuple `(texts, labels)`, or texts with `labels=`.
        method: "mean": the mean of the positive states minus that of the negative ones (CAA: Rimsky et al., [Steering
            Llama 2 via contrastive activation addition](https://arxiv.org/abs/2312.06681), 2024). "pca": the first
            principal component of the differences of pairs, as repeng makes it (Zou et al., [Representation
            engineering](https://arxiv.org/abs/2310.01405), 2023). PCA subtracts the mean difference first, so a part
            that all pairs share is not in it. "pca_center": each pair is centred instead, which keeps that part
            (repeng's method of that name). "probe": the normal of a logistic regression (needs scikit-learn).
        layers: The layers; all if None.
        positions: Over each prompt's own tokens, as in `model.collect`; −1 is the last, the answer's token in CAA.
            With several positions, the mean over them is taken in each prompt.
        labels: For texts of both kinds: True or False for each.
        norm: Scale every direction to this length. By default a mean difference keeps its own length, and the
            directions of the other methods have length 1.
        batch_size: Prompts that share a forward pass. The result does not depend on it.
        seed: Of the classifier.
        progress: Show a progress bar; with None, only if the work lasts.
        remote: Run on the remote service.

    Returns:
        A `SteeringVector`, float32 on the CPU, computed in float64 from states in the model's dtype. Its sign is such
        that positive prompts project higher than negative ones.

    Raises:
        ValueError: There is no such method, "pca" has no pairs or one side has more prompts, or the states of a layer
            give no direction.
        ModuleNotFoundError: `method="probe"`, and scikit-learn is not installed.
        InsideTraceError: Called inside a trace of this model.

    Example:
        vector = steering_vectors(model, ["I am happy. I feel"], ["I am sad. I feel"])
        print(list(vector.directions[4].shape))  # → [128]
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} is not one of {', '.join(METHODS)}.")
    if method == "probe":
        require_sklearn("sklearn.linear_model")
    length = None if norm is None else number(norm, "norm")
    options = (layers, positions, batch_size, progress, remote)
    high, low, rows, paired = _both(model, positive, negative, labels, options)
    _require_pairs(method, high, low, paired)
    directions = {layer: direction(method, high[layer], low[layer], layer, seed) for layer in high}
    vector = SteeringVector(
        directions,
        **identity_of(model),
        method=method,
        prompts=hash_of(*rows),
        details={"positions": repr(positions), "positive": len(rows[0]), "negative": len(rows[1])},
    )
    return vector if length is None else vector.to_norm(length)


def _both(
    model: StandardizedTransformer, positive: Any, negative: Any, labels: Any, options: tuple
) -> tuple[States, States, tuple[list[Row], list[Row]], bool]:
    """States and rows of both sides, and whether they are pairs."""
    if negative is not None and labels is not None:
        raise ValueError("Give negative prompts, or labels of all texts, not both.")
    if negative is None and labels is None and isinstance(positive, tuple) and len(positive) == 2:
        texts, second = positive
        if not isinstance(texts, str) and not isinstance(second, str):
            positive, labels = texts, second
    if labels is not None:
        states, rows = states_at(model, positive, *options)
        chosen = torch.tensor(read_labels(labels, len(rows)))
        sides = tuple(
            [row for row, own in zip(rows, chosen.tolist(), strict=True) if own is side] for side in (True, False)
        )
        high, low = ({layer: state[keep] for layer, state in states.items()} for keep in (chosen, ~chosen))
        return high, low, (sides[0], sides[1]), False
    if negative is None:
        pairs = split_pairs(positive)
        if pairs is None:
            raise ValueError(
                "There are no negative prompts: give negative=, labels= for all texts, a tuple (texts, labels), or a "
                "list of pairs (positive, negative)."
            )
        positive, negative = pairs
    high, upper = states_at(model, positive, *options)
    low, lower = states_at(model, negative, *options)
    return high, low, (list(upper), list(lower)), True


def _require_pairs(method: str, high: States, low: States, paired: bool) -> None:
    """Raise if a method needs pairs and has none.

    Raises:
        ValueError: It is so.
    """
    if not method.startswith("pca"):
        return
    more, less = (len(next(iter(states.values()))) for states in (high, low))
    if not paired:
        raise ValueError(f"method={method!r} takes differences of pairs; give positive and negative, not labels.")
    if more != less:
        raise ValueError(
            f"method={method!r} pairs each positive prompt with the negative one at the same place; there are {more} "
            f"positive and {less} negative prompts. method='mean' needs no pairs."
        )
    if method == "pca" and more < 2:
        raise ValueError("method='pca' needs at least 2 pairs; there is 1. Take method='mean' for one.")
