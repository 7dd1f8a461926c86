"""The scores of a components figure, from the result of an ablation or of path patching."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from nnterp.display._results import LabelledResult, Picked, about_of, pick, require_result, score_name, title_of


@dataclass(frozen=True)
class ComponentScores:
    """What the figure shows.

    Attributes:
        scores: `[components]`.
        change: `[components]`, the scores less the score of the run in which nothing is changed.
        components: Their names.
        score: What the score is.
        title: A title.
    """

    scores: np.ndarray
    change: np.ndarray
    components: list[Any]
    score: str
    title: str


def scores_of_result(given: Any, choose: Mapping[str, Any], prompt: int | None = None) -> ComponentScores:
    """The scores of each component or sender.

    Args:
        given: The result.
        choose: Axis name to the label to take there, or to "mean" to average over the axis.
        prompt: Index of the prompt to draw.

    Raises:
        ValueError: There is no axis of components, or another axis has several labels and none was chosen.
        IndexError: There is no such prompt.
        TypeError: It is no result.
    """
    result = require_result(given, "plot_components")
    name = next(iter(result.tensors))
    axes = list(result.axes[name])
    along = next((axis for axis in ("components", "senders") if axis in axes), None)
    if along is None:
        raise ValueError(f"{name} has axes {', '.join(axes)}; bars are drawn of components or senders.")
    picked = pick(result, name, choose, along, prompt=prompt)
    scores, components = picked.values, list(result.labels[along])
    if along in choose:
        scores, components = scores[None], [components[picked.taken[along]]] if along in picked.taken else ["mean"]
    unchanged = _unchanged_run(result)
    others = {axis: label for axis, label in choose.items() if axis != along}
    base = pick(result, unchanged, others, prompt=prompt).values if unchanged in result.tensors else np.zeros(())
    return ComponentScores(
        scores, scores - base, components, score_name(result, name), title_of(result, _what(result, choose, picked))
    )


def _unchanged_run(result: LabelledResult) -> str:
    """Name of the tensor with the scores of the run in which nothing is changed."""
    if "baseline" in result.tensors:
        return "baseline"
    return "clean" if about_of(result)[1].get("direction") == "noising" else "corrupted"


def _what(result: LabelledResult, choose: Mapping[str, Any], picked: Picked) -> str:
    """What was done and to which prompts, for the title: "Ablation (mean, prompt The capital of France is)"."""
    where = "mean over prompts" if choose.get("prompts") == "mean" else ""
    if "prompts" in picked.taken and len(result.labels["prompts"]) > 1:
        where = f"prompt {result.labels['prompts'][picked.taken['prompts']]}"
    about, arguments = about_of(result)
    function = str(about.get("function", "")).replace("_", " ")
    words = {"ablate": "Ablation", "path patching": "Path patching"}.get(function, function.capitalize())
    how = arguments.get("how")
    details = ", ".join(filter(None, [how if isinstance(how, str) and "<" not in how else "", where]))
    return f"{words}{f' ({details})' if details else ''}"
