"""Reading result objects: one tensor of a result with the axes that a figure needs, and the texts of its labels.

A result is any object with `tensors` (by name), `axes` (names of each tensor's axes) and `labels` (of each axis).
It may also have `tokens` (per prompt, the text at each label of "positions", None past the prompt's end), `vocabulary`
(token id to text) and `about` (a dict: model, function, arguments). `nnterp.interventions` returns such objects, but
nothing is imported from there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from nnterp.display._arrays import as_array
from nnterp.token_text import TokenNames, visible


class LabelledResult(Protocol):
    """What a figure needs of a result object."""

    @property
    def tensors(self) -> Mapping[str, Any]:
        """By name; the first is what the result is about."""

    @property
    def axes(self) -> Mapping[str, Sequence[str]]:
        """For each tensor the names of its axes."""

    @property
    def labels(self) -> Mapping[str, Sequence[Any]]:
        """For each axis its labels, in order."""


@dataclass(frozen=True)
class Picked:
    """A part of one tensor.

    Attributes:
        values: The numbers.
        axes: Names of the axes of `values`.
        taken: For each axis that was removed by choosing one label: the index of that label.
    """

    values: np.ndarray
    axes: tuple[str, ...]
    taken: dict[str, int]


def is_numbers(given: Any) -> bool:
    """True for a tensor, an array or nested lists; False for a result object."""
    return hasattr(given, "__array__") or hasattr(given, "detach") or isinstance(given, (list, tuple))


def require_result(given: Any, figure: str) -> LabelledResult:
    """Return `given` if it is a result object.

    Raises:
        TypeError: It is not.
    """
    if not all(hasattr(given, name) for name in ("tensors", "axes", "labels")):
        raise TypeError(
            f"{figure}() draws tensors, or results with `tensors`, `axes` and `labels`; "
            f"it was given a {type(given).__name__}."
        )
    return given


def refuse_choices(figure: str, choose: Mapping[str, Any]) -> None:
    """Refuse keyword arguments that choose labels, for figures of plain numbers.

    Raises:
        TypeError: There is one.
    """
    if choose:
        raise TypeError(f"{figure}() has no argument {next(iter(choose))!r}; axes are chosen of a result object only.")


def require_tensor(result: LabelledResult, name: str, how: str) -> str:
    """Return `name` if the result has a tensor of that name.

    Raises:
        ValueError: It has none; the message says how to make a result that has one.
    """
    if name not in result.tensors:
        raise ValueError(f"This result has no {name}; it has {', '.join(result.tensors)}. Make it with {how}.")
    return name


def tensor_of(result: LabelledResult, name: str) -> np.ndarray:
    """One tensor of a result as a float array."""
    return as_array(result.tensors[name], name, len(result.axes[name]))


def target_ids(result: LabelledResult) -> np.ndarray:
    """Token ids of the targets of each prompt, `[prompts, targets]`; -1 fills up shorter lists."""
    return as_array(result.tensors["target_ids"], "target_ids", 2).astype(int)


def prompt_index(prompts: Sequence[Any], prompt: int) -> int:
    """The index of a prompt, counted from the start.

    Raises:
        IndexError: There is no such prompt.
    """
    if not -len(prompts) <= prompt < len(prompts):
        raise IndexError(f"This result has {len(prompts)} prompts, so there is no prompt {prompt}.")
    return prompt % len(prompts)


def axes_in_words(result: LabelledResult) -> str:
    """The tensors of a result with their axes, for error messages."""
    return "; ".join(f"{name} [{', '.join(result.axes[name])}]" for name in result.tensors)


def pick(result: LabelledResult, name: str, choose: Mapping[str, Any], *keep: str, prompt: int | None = None) -> Picked:
    """One tensor of a result with the axes `keep`, in that order.

    Args:
        result: The result.
        name: Name of the tensor.
        choose: Axis name to the label to take there, or to "mean" to average over the axis (NaN left out).
        *keep: Axes to keep, where the tensor has them. An axis that is neither kept nor chosen must have one label.
        prompt: Index to take on the axis "prompts".

    Raises:
        ValueError: The tensor has no such axis or label, or an axis has several labels and none was chosen.
        IndexError: There is no such prompt.
    """
    axes = tuple(result.axes[name])
    array = tensor_of(result, name)
    unknown = [axis for axis in choose if axis not in axes]
    if unknown:
        raise ValueError(f"{name} has no axis {unknown[0]!r}; its axes are {', '.join(axes)}.")
    if prompt is not None and "prompts" in choose:
        raise ValueError("Choose a prompt by its index with prompt=..., or by its label with prompts=..., not both.")
    if prompt is not None and "prompts" not in axes:
        raise ValueError(f"{name} has no axis 'prompts' to choose prompt {prompt} on; its axes are {', '.join(axes)}.")
    taken: dict[str, int] = {}
    for axis in [axis for axis in axes if axis in choose or axis not in keep]:
        if averages(result, choose, axis):
            array = _mean(array, axes.index(axis))
        else:
            labels = list(result.labels[axis])
            by_index = axis == "prompts" and prompt is not None
            taken[axis] = prompt_index(labels, prompt or 0) if by_index else _index(axis, labels, choose)
            array = np.take(array, taken[axis], axis=axes.index(axis))
        axes = tuple(other for other in axes if other != axis)
    order = tuple(axis for axis in keep if axis in axes)
    return Picked(np.transpose(array, [axes.index(axis) for axis in order]), order, taken)


def _mean(array: np.ndarray, axis: int) -> np.ndarray:
    """The mean over an axis, NaN left out; NaN where there is nothing else."""
    there = ~np.isnan(array)
    total = np.where(there, array, 0.0).sum(axis)
    return np.where(there.any(axis), total / np.maximum(there.sum(axis), 1), np.nan)


def averages(result: LabelledResult, choose: Mapping[str, Any], axis: str) -> bool:
    """True if `choose` asks for the mean over an axis (which has no label "mean")."""
    return choose.get(axis) == "mean" and "mean" not in list(result.labels[axis])


def _index(axis: str, labels: list[Any], choose: Mapping[str, Any]) -> int:
    """Index of the label chosen on an axis, or of its only label."""
    if axis in choose:
        if choose[axis] not in labels:
            raise ValueError(f"{axis}={choose[axis]!r} is not among the {axis} of this result: {_listed(labels)}.")
        return labels.index(choose[axis])
    if len(labels) > 1:
        by_index = f", or by its index with prompt=0 to prompt={len(labels) - 1}" if axis == "prompts" else ""
        raise ValueError(
            f"This result has {len(labels)} {axis}: choose one with {axis}=..., one of {_listed(labels)}{by_index}."
        )
    return 0


def _listed(labels: list[Any]) -> str:
    shown = [repr(label) for label in labels]
    return ", ".join(shown if len(shown) <= 12 else [*shown[:6], "…", *shown[-3:]])


def tokens_at(result: LabelledResult, prompt: int) -> list[str] | None:
    """Token texts of one prompt at the labels of the "positions" axis, "" past its end; None if the result has none."""
    rows = getattr(result, "tokens", ()) or ()
    if not rows:
        return None
    return [token or "" for token in rows[min(prompt, len(rows) - 1)]]


def token_namer(result: LabelledResult, tokenizer: Any) -> Callable[[int], str]:
    """A function from token id to visible text, which uses the tokenizer, or without one the result's `vocabulary`."""
    if tokenizer is not None:
        return TokenNames(tokenizer)
    texts = {int(token): text for token, text in (getattr(result, "vocabulary", None) or {}).items()}
    unknown = TokenNames(None)
    return lambda token: visible(texts[int(token)]) if int(token) in texts else unknown(token)


def about_of(result: LabelledResult) -> tuple[dict[str, Any], dict[str, Any]]:
    """What made a result, and the arguments it was called with; empty where the result does not say."""
    about = getattr(result, "about", None) or {}
    return about, about.get("arguments", {})


def title_of(result: LabelledResult, what: str) -> str:
    """`what`, followed by the model's name if the result knows it."""
    model = str(about_of(result)[0].get("model", "")).rstrip("/").rpartition("/")[2]
    return f"{what}, {model}" if model else what


def score_name(result: LabelledResult, name: str) -> str:
    """Name of the metric that a tensor holds: the argument `metric` if it has a name, else the tensor's own name."""
    metric = about_of(result)[1].get("metric")
    return str(metric).replace("_", " ") if isinstance(metric, str) and "<" not in metric else name.replace("_", " ")
