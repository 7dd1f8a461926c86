"""Activations of neurons or features over texts, with a picker of the unit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nnterp.display._arrays import as_array, axis_labels, check_same
from nnterp.display._results.activations import unit_values
from nnterp.display._results.picking import refuse_choice
from nnterp.display._text import as_names
from nnterp.display._view import View, as_written

MOST_NUMBERS = 3_000_000


def plot_activations(
    tokens: Any,
    values: Any = None,
    tokenizer: Any = None,
    *,
    units: Sequence[Any] | None = None,
    kind: str = "neuron",
    unit: str = "",
    texts: Sequence[str] | None = None,
    title: str | None = None,
    prompt: int | None = None,
    show: bool = False,
) -> View:
    """Texts, each token shaded by the activation of one neuron or feature there, with a picker of which.

    Args:
        tokens: The tokens of a text, as ids or texts, or a list of such lists for several texts; or a result whose main
            tensor has positions and one further axis.
        values: `[positions, units]`, or a list of these, one for each text.
        tokenizer: Names tokens that are given as ids.
        units: Labels of the units; 0, 1, … if None.
        kind: What the units are: "neuron", "feature", "head".
        unit: The unit of the numbers.
        texts: A heading for each text.
        title: Plain text.
        prompt: For a result of several prompts, which one to draw, by its index.
        show: Also show the view, in a notebook or a browser.

    Returns:
        A page; `nnterp.display.save` writes it. Orange is positive and blue negative, up to the unit's largest
        magnitude over all texts; every token has its number below it.

    Raises:
        ValueError: There is not one row for each token, texts differ in their number of units, or there are more than
            3,000,000 numbers.
        IndexError: There is no such prompt.

    Example:
        >>> import torch
        >>> from nnterp import display
        >>> view = display.plot_activations([" a", " b"], torch.tensor([[0.0, 1.5], [2.0, -1.0]]), units=[7, 12])
        >>> view.data["units"]
        ['7', '12']
    """
    if values is None:
        read = unit_values(tokens, prompt)
        names, given = [read.tokens], [read.values]
        units = read.units if units is None else units
        kind = read.kind if kind == "neuron" else kind
        title = read.title if title is None else title
    else:
        refuse_choice("plot_activations", {}, prompt)
        several = isinstance(values, (list, tuple)) and bool(values) and hasattr(values[0], "shape")
        given = list(values) if several else [values]
        named = list(tokens) if several else [tokens]
        check_same("tokens", len(named), len(given), "the list of values")
        names = [as_names(one, tokenizer) for one in named]
    arrays = [as_array(one, "values ([positions, units])", 2) for one in given]
    for own, array in zip(names, arrays, strict=True):
        check_same("tokens", len(own), len(array), "the position axis of values")
    counts = [array.shape[1] for array in arrays]
    if len(set(counts)) > 1:
        raise ValueError(f"All texts must have the same units; they have {counts}.")
    if sum(array.size for array in arrays) > MOST_NUMBERS:
        raise ValueError(
            f"{sum(array.size for array in arrays):,} activations are more than the {MOST_NUMBERS:,} that a page can "
            "carry. Choose units: values[:, chosen]."
        )
    headings = (
        axis_labels(texts, len(arrays), "texts", "the list of values") if texts is not None else [""] * len(arrays)
    )
    data = {
        "kind": kind,
        "unit": unit,
        "units": axis_labels(units, counts[0], "units", "the unit axis of values"),
        "texts": [
            {"name": heading, "tokens": own, "values": as_written(array.T)}
            for heading, own, array in zip(headings, names, arrays, strict=True)
        ],
    }
    view = View(f"Activations of each {kind}" if title is None else title, "activations.js", data)
    if show:
        view.show()
    return view
