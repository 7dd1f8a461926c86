"""Scores as a pandas data frame."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    import pandas as pd


def scores_frame(
    scores: Mapping[str, torch.Tensor],
    name: str,
    texts: Sequence[str],
    metadata: Sequence[Mapping[str, Any]],
    chosen: Iterable[int],
) -> pd.DataFrame:
    """Return a data frame with one row for each chosen prompt and category (and layer).

    Args:
        scores: `[prompts]` or `[prompts, layers]` for each category.
        name: Name of the column of scores.
        texts: The text of each prompt.
        metadata: The metadata of each prompt, which become columns.
        chosen: Indices of the prompts.

    Raises:
        ImportError: pandas is not installed.
    """
    try:
        import pandas as pd
    except ImportError as error:
        raise ImportError("to_dataframe() needs pandas: pip install 'nnterp-prompts[dataframe]'") from error
    layered = any(values.dim() == 2 for values in scores.values())
    columns = ["prompt_index", "prompt", "category", *(["layer"] if layered else []), name]
    extra = list(dict.fromkeys(key for data in metadata for key in data if key not in columns))
    rows: list[list[Any]] = []
    for i in chosen:
        beside = [metadata[i].get(key) for key in extra]
        for category, values in scores.items():
            if layered:
                rows += [[i, texts[i], category, k, score, *beside] for k, score in enumerate(values[i].tolist())]
            else:
                rows.append([i, texts[i], category, values[i].item(), *beside])
    return pd.DataFrame(rows, columns=[*columns, *extra])
