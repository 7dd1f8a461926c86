"""Reduce a tensor of a result to the axes that a figure draws: of every other axis, one entry or the mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from nnterp.display._results.labelled import LabelledResult, array_of
from nnterp.indices import integer


@dataclass(frozen=True)
class Picked:
    """A tensor of a result after some of its axes were removed.

    Attributes:
        array: What is left of the tensor.
        axes: Names of the axes of `array`.
        taken: For each axis that was removed by taking one index, that index. Averaged axes are not in it.
    """

    array: np.ndarray
    axes: tuple[str, ...]
    taken: dict[str, int]


@dataclass(frozen=True)
class At:
    """An entry of an axis that is chosen by its index, and not by its label."""

    index: int


def pick(result: LabelledResult, name: str, choose: Mapping[str, Any], *keep: str) -> Picked:
    """Reduce one tensor of a result to the axes in `keep`, in that order.

    Args:
        result: The result.
        name: The tensor.
        choose: For an axis, the label to take, `At` its index, or "mean" to average over the axis.
        *keep: The axes to keep. Axes that the tensor does not have are skipped, and so are axes in `choose`.

    Raises:
        ValueError: `choose` names an axis or a label that is not there, or an axis that is neither kept nor chosen has
            several labels.
        IndexError: The axis has no such index.
    """
    axes = tuple(result.axes[name])
    array = array_of(result, name)
    _check_axes(result, name, choose)
    taken: dict[str, int] = {}
    for axis in [axis for axis in axes if axis in choose or axis not in keep]:
        if is_mean(result, axis, choose):
            array = np.nanmean(array, axis=axes.index(axis))
        else:
            taken[axis] = _chosen_index(axis, list(result.labels[axis]), choose)
            array = np.take(array, taken[axis], axis=axes.index(axis))
        axes = tuple(other for other in axes if other != axis)
    order = tuple(axis for axis in keep if axis in axes)
    return Picked(np.transpose(array, [axes.index(axis) for axis in order]), order, taken)


def _check_axes(result: LabelledResult, name: str, choose: Mapping[str, Any]) -> None:
    """Check that the tensor called `name` has every axis in `choose`."""
    unknown = [axis for axis in choose if axis not in result.axes[name]]
    if unknown:
        raise ValueError(f"{name} has no axis {unknown[0]!r}; its axes are {', '.join(result.axes[name])}.")


def _chosen_index(axis: str, labels: list[Any], choose: Mapping[str, Any]) -> int:
    """The index that was chosen for an axis, 0 for an axis with one label."""
    if isinstance(choose.get(axis), At):
        return checked_index(axis, len(labels), choose[axis].index)
    if axis in choose:
        if choose[axis] not in labels:
            raise ValueError(f"{axis}={choose[axis]!r} is not among the {axis} of this result: {_listed(labels)}.")
        return labels.index(choose[axis])
    if len(labels) == 1:
        return 0
    how = f"prompt=i, i from 0 to {len(labels) - 1}" if axis == "prompts" else f"{axis}=..., one of {_listed(labels)}"
    raise ValueError(f"This result has {len(labels)} {axis}: choose one with {how}.")


def checked_index(axis: str, count: int, index: int) -> int:
    """An index of an axis, negative ones counted from the end.

    Raises:
        IndexError: The axis is not that long.
        TypeError: It is no integer.
    """
    index = integer(index, axis.removesuffix("s"))
    if not -count <= index < count:
        raise IndexError(f"This result has {count} {axis}, so there is no {axis.removesuffix('s')} {index}.")
    return index % count


def is_mean(result: LabelledResult, axis: str, choose: Mapping[str, Any]) -> bool:
    """True if the average over an axis was chosen, and none of its labels is called "mean"."""
    return choose.get(axis) == "mean" and "mean" not in result.labels[axis]


def at_prompt(prompt: int | None) -> dict[str, At]:
    """The choice of a prompt by its index, for `pick`."""
    return {} if prompt is None else {"prompts": At(prompt)}


def refuse_choice(figure: str, choose: Mapping[str, Any], prompt: int | None) -> None:
    """Check that nothing is chosen of plain numbers, which have no labelled axes.

    Raises:
        TypeError: Something is.
    """
    for name in [*(["prompt"] if prompt is not None else []), *choose]:
        raise TypeError(f"{figure}() has no argument {name!r}; axes are chosen of a result object only.")


def choose_prompt(
    result: LabelledResult, name: str, choose: Mapping[str, Any], prompt: int | None
) -> Mapping[str, Any]:
    """`choose`, with the prompt that was given by its index, for a figure that draws one prompt or the mean.

    Raises:
        ValueError: A prompt was chosen twice, the tensor called `name` has several and none was chosen, or it does not
            have an axis in `choose`.
    """
    _check_axes(result, name, choose)
    if prompt is not None:
        if "prompts" in choose:
            raise ValueError(f"Give prompt={prompt} or prompts={choose['prompts']!r}, not both.")
        return {**choose, **at_prompt(prompt)}
    count = len(result.labels["prompts"]) if "prompts" in result.axes[name] else 1
    if count > 1 and "prompts" not in choose:
        raise ValueError(
            f"This result has {count} prompts: draw one with prompt=i, i from 0 to {count - 1}, or their mean with "
            f'prompts="mean".'
        )
    return choose


def _listed(labels: list[Any]) -> str:
    shown = [repr(label) for label in labels]
    return ", ".join(shown if len(shown) <= 12 else [*shown[:6], "…", *shown[-3:]])
