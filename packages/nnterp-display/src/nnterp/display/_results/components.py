"""Read the scores of ablated components, or of patched paths, from a result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from nnterp.display._results.labelled import (
    LabelledResult,
    about,
    arguments,
    main_tensor,
    require_result,
    score_name,
    title_of,
)
from nnterp.display._results.picking import Picked, choose_prompt, pick


@dataclass(frozen=True)
class ComponentScores:
    """What `plot_components` draws of a result.

    Attributes:
        values: `[components]`, the score with each component changed.
        changes: `[components]`, the same less the score of the run in which nothing is changed.
        components: Their labels.
        score: What the scores are.
        title: The figure's title.
    """

    values: np.ndarray
    changes: np.ndarray
    components: list[Any]
    score: str
    title: str


def component_scores(given: Any, choose: Mapping[str, Any], prompt: int | None = None) -> ComponentScores:
    """The result's main tensor over components (or senders of paths).

    Args:
        given: The result.
        choose: For each further axis, the label to draw, or "mean".
        prompt: Which prompt to draw, by its index.

    Raises:
        TypeError: `given` is no result.
        ValueError: It has no such axis, or a further axis has several labels and none was chosen.
        IndexError: There is no such prompt.
    """
    result = require_result(given, "plot_components")
    name = main_tensor(result)
    along = next((axis for axis in ("components", "senders") if axis in result.axes[name]), None)
    if along is None:
        raise ValueError(f"{name} has axes {', '.join(result.axes[name])}; bars are drawn of components or senders.")
    choose = choose_prompt(result, name, choose, prompt)
    picked = pick(result, name, choose, along)
    labels = list(result.labels[along])
    if along in choose:
        labels = [labels[picked.taken[along]]] if along in picked.taken else ["mean"]
    values = np.atleast_1d(picked.array)
    baseline = _baseline(result, {axis: label for axis, label in choose.items() if axis != along})
    details = _details(result, picked, choose)
    return ComponentScores(
        values=values,
        changes=values - baseline,
        components=labels,
        score=score_name(result, name),
        title=title_of(result, f"{_what_was_done(result)}{f' ({details})' if details else ''}"),
    )


def _baseline(result: LabelledResult, choose: Mapping[str, Any]) -> np.ndarray:
    """The score of the run in which nothing is changed; 0 if the result does not have it.

    Path patching changes the corrupted run, or, with direction "noising", the clean one.
    """
    name = "baseline"
    if name not in result.tensors:
        name = "clean" if arguments(result).get("direction") == "noising" else "corrupted"
    return pick(result, name, choose).array if name in result.tensors else np.zeros(())


def _details(result: LabelledResult, picked: Picked, choose: Mapping[str, Any]) -> str:
    """How components were ablated, if that has a name, and which prompt is drawn."""
    how = arguments(result).get("how")
    details = [how] if isinstance(how, str) and "<" not in how else []
    prompts = result.labels.get("prompts", ())
    if "prompts" in picked.taken and len(prompts) > 1:
        details.append(f"prompt {prompts[picked.taken['prompts']]}")
    elif choose.get("prompts") == "mean":
        details.append("mean over prompts")
    return ", ".join(details)


def _what_was_done(result: LabelledResult) -> str:
    function = str(about(result).get("function", "")).replace("_", " ")
    return {"ablate": "Ablation", "path patching": "Path patching"}.get(function, function.capitalize())
