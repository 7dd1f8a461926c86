"""What a model predicted at each position, beside the token that came."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from nnterp.display._arrays import as_array, check_same
from nnterp.indices import integers


@dataclass(frozen=True)
class Predicted:
    """Predictions at some positions, and the tokens that came there; log-probabilities in nats.

    Attributes:
        ids: `[n]`, the tokens that came.
        own: `[n]`, their log-probabilities in nats.
        ranks: `[n]`, 1 for the most probable token.
        entropy: `[n]`, of each prediction, in nats.
        top_ids, top: `[n, k]`, the most probable tokens and their log-probabilities, most probable first.
    """

    ids: np.ndarray
    own: np.ndarray
    ranks: np.ndarray
    entropy: np.ndarray
    top_ids: np.ndarray
    top: np.ndarray


def predicted(logits: Any, ids: Any, top_k: int, what: str) -> Predicted:
    """The predictions of the tokens `ids`, `[n]`, by logits or log-probabilities `[n, vocab]`, in double precision.

    Raises:
        ValueError: There is not one row for each token, an id is not in the vocabulary, or the rows are probabilities.
    """
    rows = as_array(logits, what, 2)
    if np.isnan(rows).any():
        raise ValueError(f"{what} holds NaN.")
    if (rows >= 0).all() and np.allclose(rows.sum(-1), 1.0, atol=1e-2):
        raise ValueError(f"{what} holds probabilities; give logits, or their log-probabilities: probabilities.log().")
    plain = integers(ids, "tokens")
    listed = np.asarray([plain] if isinstance(plain, int) else plain)
    check_same("tokens", len(listed), len(rows), what)
    if listed.min() < 0 or listed.max() >= rows.shape[1]:
        raise ValueError(f"tokens go up to {listed.max()}, but {what} has a vocabulary of {rows.shape[1]}.")
    logs = rows - rows.max(-1, keepdims=True)
    logs = logs - np.log(np.exp(logs).sum(-1, keepdims=True))
    own = np.take_along_axis(logs, listed[:, None], -1)
    finite = np.where(np.isfinite(logs), logs, 0.0)
    k = min(top_k, rows.shape[1])
    some = np.argpartition(-logs, k - 1, axis=-1)[:, :k]
    order = np.argsort(-np.take_along_axis(logs, some, -1), axis=-1, kind="stable")
    best = np.take_along_axis(some, order, -1)
    return Predicted(
        ids=listed,
        own=own[:, 0],
        ranks=(logs > own).sum(-1) + 1,
        entropy=-(np.exp(logs) * finite).sum(-1),
        top_ids=best,
        top=np.take_along_axis(logs, best, -1),
    )
