"""Read the top tokens of a patchscope's readings from a result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nnterp.display._results.labelled import require_result, title_of, token_namer
from nnterp.display._results.picking import pick


@dataclass(frozen=True)
class Readings:
    """What `plot_patchscope` draws of a result.

    Attributes:
        texts: `[sources][layers][k]`, visible tokens, most probable first.
        probabilities: `[sources, layers, k]`.
        sources, layers: Labels of these axes.
        title: The figure's title.
    """

    texts: list[list[list[str]]]
    probabilities: np.ndarray
    sources: Sequence[Any]
    layers: Sequence[Any]
    title: str


def readings(given: Any, tokenizer: Any) -> Readings:
    """The top tokens by source (or by prompt) and layer.

    Raises:
        TypeError: `given` is no result.
        ValueError: It has no top tokens, or not by source and layer.
    """
    result = require_result(given, "plot_patchscope")
    if "top_ids" not in result.tensors:
        raise ValueError(f"This result has no top tokens; it has {', '.join(result.tensors)}. Make it with top_k=3.")
    axes = result.axes["top_ids"]
    down = next((axis for axis in ("sources", "prompts") if axis in axes), None)
    if down is None or "layers" not in axes:
        raise ValueError(f"top_ids has axes {', '.join(axes)}; a table of readings needs sources and layers.")
    ids = pick(result, "top_ids", {}, down, "layers", "top").array.astype(int)
    name = token_namer(result, tokenizer)
    return Readings(
        texts=[[[name(token) for token in cell] for cell in column] for column in ids],
        probabilities=pick(result, "top_probs", {}, down, "layers", "top").array,
        sources=list(result.labels[down]),
        layers=list(result.labels["layers"]),
        title=title_of(result, "Patchscope"),
    )
