"""Read the cells of a logit-lens grid from a result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nnterp.display._arrays import axis_labels
from nnterp.display._lens_cells import Colour, LensCells, colour_title
from nnterp.display._results.labelled import (
    LabelledResult,
    array_of,
    input_names,
    require_result,
    title_of,
    token_namer,
)
from nnterp.display._results.picking import checked_index
from nnterp.token_text import visible


@dataclass(frozen=True)
class _Columns:
    """The columns of the grid: the positions of one prompt, or, of a result without positions, the prompts.

    Attributes:
        prompt: The prompt whose positions are the columns, None if each column is a prompt.
        indices: Which positions, or which prompts.
        labels: Labels of the columns.
        inputs: The input token (or the text) of each column, "" where it is not known.
        axis: Title of the axis.
        title: What the figure shows.
    """

    prompt: int | None
    indices: list[int]
    labels: list[Any]
    inputs: list[str]
    axis: str
    title: str

    def take(self, result: LabelledResult, name: str) -> np.ndarray:
        """The tensor called `name` as `[layers, columns, ...]`."""
        array = array_of(result, name)
        return (np.swapaxes(array, 0, 1) if self.prompt is None else array[self.prompt])[:, self.indices]

    def prompts(self) -> list[int]:
        """For each column, its prompt."""
        return self.indices if self.prompt is None else [self.prompt] * len(self.indices)


def lens_cells(
    given: Any,
    tokenizer: Any,
    *,
    prompt: int,
    kind: Colour,
    top_k: int | None,
    target: int | None,
    layers: Sequence[Any] | None,
) -> tuple[LensCells, str]:
    """The cells of a result with `top_ids` and `top_probs`, and a title; arguments as in `plot_lens`.

    Raises:
        TypeError: `given` is no result.
        ValueError: The result lacks what is to be drawn, the prompt does not have this target, or `layers` is not one
            label for each layer.
        IndexError: There is no such prompt.
    """
    result = require_result(given, "plot_lens")
    if "top_ids" not in result.tensors:
        raise ValueError(
            f"This result has no top tokens to put in the cells; it has {', '.join(result.tensors)}. "
            f"Make it with top_k=5."
        )
    columns = _columns(result, prompt, tokenizer)
    kept = len(result.labels["top"])
    top_k = kept if top_k is None else top_k
    if top_k > kept:
        raise ValueError(
            f"This result holds the {kept} top tokens of each cell, not {top_k}. Make it with top_k={top_k}."
        )
    probabilities = columns.take(result, "top_probs")[..., :top_k]
    name = token_namer(result, tokenizer)
    targets = None
    if kind == "entropy":
        colour = columns.take(result, _require(result, "entropy", "entropy=True"))
    elif kind == "kl":
        colour = columns.take(result, _require(result, "kl", "logit_lens_table() or against_last=True"))
    elif kind == "rank" and target is None:
        how = "logit_lens_table() or against_last=True, or give target= for the rank of a target"
        colour = columns.take(result, _require(result, "last_ranks", how)) + 1.0
    elif target is not None:
        colour, ids = _target_values(result, columns, kind, target)
        targets = [name(token) for token in ids]
    else:
        colour = probabilities[..., 0]
    ids_in_cells = columns.take(result, "top_ids")[..., :top_k].astype(int)
    cells = LensCells(
        tokens=[[[name(token) for token in cell] for cell in row] for row in ids_in_cells],
        probabilities=probabilities,
        colour=colour,
        colour_name=colour_title(kind, targets is not None, _compared_with(result)),
        kind=kind,
        layers=axis_labels(
            result.labels["layers"] if layers is None else layers, len(colour), "layers", "the layer axis of the result"
        ),
        positions=columns.labels,
        inputs=columns.inputs,
        targets=targets,
        column_axis=columns.axis,
    )
    return cells, title_of(result, columns.title)


def _columns(result: LabelledResult, prompt: int, tokenizer: Any) -> _Columns:
    prompts = list(result.labels["prompts"])
    prompt = checked_index("prompts", len(prompts), prompt)
    if "positions" not in result.labels or "positions" not in result.axes["top_ids"]:
        indices = list(range(len(prompts)))
        inputs = [str(text) for text in prompts]
        return _Columns(None, indices, indices, inputs, "prompt", f"{_lens_of(result)} after each prompt")
    tokens = input_names(result, prompt, tokenizer) or [""] * len(result.labels["positions"])
    indices = [i for i, token in enumerate(tokens) if token or not any(tokens)]
    return _Columns(
        prompt=prompt,
        indices=indices,
        labels=[result.labels["positions"][i] for i in indices],
        inputs=[tokens[i] for i in indices],
        axis="position (input token)",
        title=f"{_lens_of(result)} of {_quoted(prompts[prompt])}",
    )


def _compared_with(result: LabelledResult) -> Any:
    """The layer that the ranks and distances are from: the model's last; of older results, the last that was read."""
    return getattr(result, "about", {}).get("arguments", {}).get("against_last", max(result.labels["layers"]))


def _lens_of(result: LabelledResult) -> str:
    """What the result was read with."""
    kind = getattr(result, "about", {}).get("arguments", {}).get("lens")
    return f"{str(kind).capitalize()} lens" if kind else "Logit lens"


def _target_values(
    result: LabelledResult, columns: _Columns, kind: Colour, target: int
) -> tuple[np.ndarray, list[int]]:
    """The target's rank (from 1) or probability, `[layers, columns]`, and for each column the target's id."""
    tensor = _require(result, "target_ranks" if kind == "rank" else "target_probs", "targets=..., ranks=True")
    listed = array_of(result, "target_ids").astype(int)
    prompts = columns.prompts()
    places = [_target_place(listed[prompt].tolist(), prompt, target) for prompt in prompts]
    values = np.take_along_axis(columns.take(result, tensor), np.array(places)[None, :, None], -1)[..., 0]
    ids = [int(listed[prompt, place]) for prompt, place in zip(prompts, places, strict=True)]
    return values + (1.0 if kind == "rank" else 0.0), ids


def _target_place(targets: list[int], prompt: int, target: int) -> int:
    """The place of a target in one prompt's list of targets."""
    if target not in targets:
        raise ValueError(
            f"Token {target} is not among the targets of prompt {prompt}: {[i for i in targets if i >= 0]}."
        )
    return targets.index(target)


def _require(result: LabelledResult, name: str, how: str) -> str:
    """`name`, if the result has this tensor; the error says with which arguments to make a result that has it."""
    if name not in result.tensors:
        raise ValueError(f"This result has no {name}; it has {', '.join(result.tensors)}. Make it with {how}.")
    return name


def _quoted(text: Any) -> str:
    shown = visible(str(text)).replace("·", " ")
    return f"“{shown if len(shown) <= 60 else shown[:59] + '…'}”"
