"""Read the contexts of one feature from a report of features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from nnterp.display._results.labelled import array_of, require_result, title_of, token_namer
from nnterp.indices import integer


@dataclass(frozen=True)
class Contexts:
    """What `plot_features` draws.

    Attributes:
        tokens: For each context its tokens, as visible texts.
        values: For each context the activation at each of its tokens.
        peaks: The largest activation of the text of each context.
        density: Share of positions at which the feature is active, None if it is not known.
        title: The figure's title.
    """

    tokens: list[list[str]]
    values: list[np.ndarray]
    peaks: list[float]
    density: float | None
    title: str | None


def contexts_of(given: Any, feature: int | None, top: int | None) -> Contexts:
    """The strongest contexts of a feature.

    Raises:
        TypeError: `given` is no result.
        ValueError: It has no contexts, not this feature, or several and none was chosen; or it is never active.
    """
    result = require_result(given, "plot_features")
    if not {"activations", "token_ids", "peaks"} <= set(result.tensors):
        raise ValueError(f"This result has no contexts of features; it has {', '.join(result.tensors)}.")
    features = list(result.labels["features"])
    if feature is None and len(features) > 1:
        raise ValueError(f"This result has {len(features)} features: choose one with feature=, such as {features[0]}.")
    chosen = features[0] if feature is None else integer(feature, "feature")
    if chosen not in features:
        raise ValueError(f"This result holds no feature {chosen}; it holds {len(features)}, such as {features[0]}.")
    at = features.index(chosen)
    ids, values = array_of(result, "token_ids")[at], array_of(result, "activations")[at]
    peaks = array_of(result, "peaks")[at]
    ranks = [rank for rank in range(len(ids)) if (ids[rank] >= 0).any()][:top]
    if not ranks:
        raise ValueError(f"Feature {chosen} is not active on any of these texts, so it has no context.")
    name = token_namer(result, None)
    density = float(array_of(result, "density")[at]) if "density" in result.tensors else None
    return Contexts(
        [[name(int(i)) for i in ids[rank] if i >= 0] for rank in ranks],
        [values[rank][ids[rank] >= 0] for rank in ranks],
        [float(peaks[rank]) for rank in ranks],
        density,
        title_of(result, f"Feature {chosen}"),
    )
