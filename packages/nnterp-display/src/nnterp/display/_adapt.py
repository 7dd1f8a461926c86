"""From labelled result objects to what the figures draw.

A result is any object with `tensors` (by name), `axes` (names of each tensor's axes) and `labels` (of each axis), and
optionally `tokens` (per prompt, the text at each label of "positions", None past its end), `vocabulary` (id → text)
and `about` (a dict with the model's name): what `nnterp.interventions` returns. No other package is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from nnterp.display._arrays import as_array
from nnterp.token_text import TokenNames, visible

if TYPE_CHECKING:
    from nnterp.display._lens import Colour, LensCells


def is_numbers(given: Any) -> bool:
    """Whether this is a tensor, an array or nested lists, not a result object."""
    return hasattr(given, "__array__") or hasattr(given, "detach") or isinstance(given, (list, tuple))


def require_result(given: Any, figure: str) -> Any:
    """The result, if it is one.

    Raises:
        TypeError: It is neither numbers nor a result.
    """
    if not all(hasattr(given, name) for name in ("tensors", "axes", "labels")):
        raise TypeError(
            f"{figure}() draws tensors, or results with `tensors`, `axes` and `labels`; "
            f"it was given a {type(given).__name__}."
        )
    return given


def pick(
    result: Any, name: str, choose: Mapping[str, Any], *keep: str
) -> tuple[np.ndarray, tuple[str, ...], dict[str, int]]:
    """One tensor of a result, its axes in the order of `keep`, every other axis chosen, averaged or of length one.

    Returns:
        The numbers, the axes left, and for each axis that was taken away the index it was taken at.

    Raises:
        ValueError: An axis that is not in `keep` has several labels and none of them was chosen.
    """
    axes = tuple(result.axes[name])
    array = as_array(result.tensors[name], name, len(axes))
    unknown = [axis for axis in choose if axis not in axes]
    if unknown:
        raise ValueError(f"{name} has no axis {unknown[0]!r}; its axes are {', '.join(axes)}.")
    taken: dict[str, int] = {}
    for axis in [axis for axis in axes if axis in choose or axis not in keep]:
        labels = list(result.labels[axis])
        if choose.get(axis) == "mean" and "mean" not in labels:
            array = np.nanmean(array, axis=axes.index(axis))
            axes = tuple(other for other in axes if other != axis)
            continue
        if axis in choose:
            if choose[axis] not in labels:
                raise ValueError(f"{axis}={choose[axis]!r} is not among the {axis} of this result: {_listed(labels)}.")
            index = labels.index(choose[axis])
        elif len(labels) == 1:
            index = 0
        else:
            raise ValueError(
                f"This result has {len(labels)} {axis}: choose one with {axis}=..., one of {_listed(labels)}."
            )
        array = np.take(array, index, axis=axes.index(axis))
        axes = tuple(other for other in axes if other != axis)
        taken[axis] = index
    order = [axis for axis in keep if axis in axes]
    return np.transpose(array, [axes.index(axis) for axis in order]), tuple(order), taken


def tokens_at(result: Any, prompt: int) -> list[str] | None:
    """The texts of one prompt at the labels of the "positions" axis, "" past its end; None if they are not known."""
    rows = getattr(result, "tokens", ()) or ()
    if not rows:
        return None
    return [token or "" for token in rows[min(prompt, len(rows) - 1)]]


def namer(result: Any, tokenizer: Any) -> Any:
    """A function from token id to visible text: the tokenizer's, or the texts that the result carries."""
    if tokenizer is not None:
        return TokenNames(tokenizer)
    texts = {int(token): text for token, text in (getattr(result, "vocabulary", None) or {}).items()}
    unknown = TokenNames(None)
    return lambda token: visible(texts[int(token)]) if int(token) in texts else unknown(token)


def title_of(result: Any, what: str) -> str:
    """A title that says what is shown, of which model."""
    model = str((getattr(result, "about", None) or {}).get("model", "")).rstrip("/").rpartition("/")[2]
    return f"{what}, {model}" if model else what


def lens_cells(
    result: Any, tokenizer: Any, *, prompt: int, colour: Colour, top_k: int, target: int | None, layers: Any
) -> tuple[LensCells, str]:
    """The cells of a lens result with `top_probs` and `top_ids`, and a title."""
    from nnterp.display._lens import LABELS, LensCells

    require_result(result, "plot_lens")
    if "top_ids" not in result.tensors:
        raise ValueError(
            f"This result has no top tokens to put in the cells; it has {', '.join(result.tensors)}. "
            f"Make it with top_k=5."
        )
    prompts = list(result.labels["prompts"])
    if not -len(prompts) <= prompt < len(prompts):
        raise IndexError(f"This result has {len(prompts)} prompts, so there is no prompt {prompt}.")
    prompt %= len(prompts)
    by_position = "positions" in result.labels and "positions" in result.axes["top_ids"]

    def take(name: str) -> np.ndarray:
        """`[layers, columns, ...]`: one prompt's positions, or one column per prompt."""
        array = as_array(result.tensors[name], name, len(result.axes[name]))
        return array[prompt] if by_position else np.swapaxes(array, 0, 1)

    if by_position:
        tokens = tokens_at(result, prompt) or [""] * len(result.labels["positions"])
        columns = [i for i, token in enumerate(tokens) if token or not any(tokens)]
        inputs = [visible(tokens[i]) if tokens[i] else "" for i in columns]
        positions = [result.labels["positions"][i] for i in columns]
        what = f"Logit lens of {_quoted(prompts[prompt])}"
    else:
        columns = list(range(len(prompts)))
        inputs = [str(text) for text in prompts]
        positions = columns
        what = "Logit lens after each prompt"
    ids, probabilities = take("top_ids")[:, columns, :top_k], take("top_probs")[:, columns, :top_k]
    name = namer(result, tokenizer)
    texts = [[[name(token) for token in cell] for cell in row] for row in ids.astype(int)]
    chosen = None
    if colour == "entropy":
        values = take(_has(result, "entropy", "entropy=True"))[:, columns]
    elif colour == "rank" or target is not None:
        tensor = _has(result, "target_ranks" if colour == "rank" else "target_probs", "targets=..., ranks=True")
        owners = [prompt] * len(columns) if by_position else columns
        places = [_target_place(result, owner, target) for owner in owners]
        values = take(tensor)[:, columns]
        values = np.stack([values[:, i, place] for i, place in enumerate(places)], axis=1) + (
            1.0 if colour == "rank" else 0.0
        )
        own = as_array(result.tensors["target_ids"], "target_ids", 2).astype(int)
        chosen = [name(own[owner, place]) for owner, place in zip(owners, places, strict=True)]
    else:
        values = probabilities[..., 0]
    label = LABELS[colour, chosen is not None]
    rows = [str(layer) for layer in (result.labels["layers"] if layers is None else layers)]
    unit = "position (input token)" if by_position else "prompt"
    return LensCells(texts, probabilities, values, label, colour, rows, positions, inputs, chosen, unit), title_of(
        result, what
    )


def target_curves(result: Any) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Category → `[prompts, layers]` of a result with target probabilities."""
    require_result(result, "plot_targets")
    name = next(
        (n for n in ("target_probs", "probs", "scores") if n in result.tensors and "layers" in result.axes[n]), None
    )
    if name is None:
        there = "; ".join(f"{n} [{', '.join(result.axes[n])}]" for n in result.tensors)
        raise ValueError(f"This result has no target probabilities with a layer axis; it has {there}.")
    axes = list(result.axes[name])
    array = as_array(result.tensors[name], name, len(axes))
    if "positions" in axes:
        array = _last_of_each(array, axes)
        axes.remove("positions")
    kind = next((axis for axis in ("categories", "targets") if axis in axes), None)
    order = [axis for axis in (kind, "prompts", "layers") if axis is not None and axis in axes]
    if sorted(order) != sorted(axes):
        raise ValueError(f"{name} has axes {', '.join(axes)}; curves are drawn of categories, prompts and layers.")
    array = np.transpose(array, [axes.index(axis) for axis in order])
    if kind is None:
        array, labels = array[None], [name.removesuffix("_probs")]
    else:
        labels = _target_labels(result, kind)
    return dict(zip(labels, array, strict=True)), {
        "layers": result.labels["layers"],
        "title": title_of(result, "Targets"),
    }


def sweep(result: Any, choose: Mapping[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
    """`[layers, columns]` of a sweep's main tensor, with the labels of its axes."""
    require_result(result, "plot_patching")
    name = next(iter(result.tensors))
    axes = [axis for axis in result.axes[name] if axis not in choose]
    if "layers" not in axes:
        raise ValueError(f"{name} has axes {', '.join(axes)}; a patching map needs layers and one other axis.")
    others = [axis for axis in axes if axis != "layers"]
    across = next((axis for axis in ("positions", "heads", "neurons") if axis in others), others[0] if others else None)
    if across is None:
        raise ValueError(f"{name} has the axis layers alone; a patching map needs one other axis.")
    array, _, taken = pick(result, name, choose, "layers", across)
    labels = list(result.labels[across])
    column_axis = across.removesuffix("s")
    if across == "positions":
        texts = tokens_at(result, taken["prompts"]) if "prompts" in taken else None
        column_axis = "position (token)" if texts else "position"
        labels = texts or labels
    fixed = ", ".join(
        f"{axis.removesuffix('s')} {result.labels[axis][i]}"
        for axis, i in taken.items()
        if len(result.labels[axis]) > 1
    )
    averaged = [axis for axis, label in choose.items() if label == "mean" and axis not in taken]
    fixed = ", ".join(filter(None, [fixed, *(f"mean over {axis}" for axis in averaged)]))
    score = score_name(result, name)
    title = title_of(result, f"{_sweep_name(result)}{f' ({fixed})' if fixed else ''}")
    return array, {
        "columns": labels,
        "layers": list(result.labels["layers"]),
        "column_axis": column_axis,
        "score": score,
        "title": title,
    }


def attention(result: Any) -> tuple[np.ndarray, dict[str, Any]]:
    """A pattern tensor of a result, with the labels of its axes."""
    require_result(result, "plot_attention")
    names = [
        name for name in result.tensors if tuple(result.axes[name])[-2:] in (("queries", "keys"), ("query", "key"))
    ]
    if not names:
        there = "; ".join(f"{n} [{', '.join(result.axes[n])}]" for n in result.tensors)
        raise ValueError(f"This result has no tensor whose last axes are queries and keys; it has {there}.")
    axes = tuple(result.axes[names[0]])
    array, left, taken = pick(result, names[0], {}, "layers", "heads", *axes[-2:])
    own: dict[str, Any] = {axis: list(result.labels[axis]) for axis in ("layers", "heads") if axis in left}
    return array, {
        **own,
        "tokens": tokens_at(result, taken.get("prompts", 0)) or list(map(str, result.labels[axes[-1]])),
    }


def token_values(result: Any, name: str) -> tuple[list[str], np.ndarray, str]:
    """One value per position of a result's main tensor, and what it is called."""
    require_result(result, "plot_tokens")
    main = next(iter(result.tensors))
    array, _, taken = pick(result, main, {}, "positions")
    tokens = tokens_at(result, taken.get("prompts", 0))
    if tokens is None:
        raise ValueError("This result does not carry its tokens; give plot_tokens(tokens, values).")
    kept = [i for i, token in enumerate(tokens) if token]
    return [tokens[i] for i in kept], array[kept], main if name == "value" else name


def readings(
    result: Any, tokenizer: Any, top_k: int | None
) -> tuple[list[list[list[str]]], np.ndarray, dict[str, Any]]:
    """The top tokens `[sources][layers][k]` of a patchscope's result, their probabilities and the labels."""
    from nnterp.display._patchscope import shown_tokens

    require_result(result, "plot_patchscope")
    if "top_ids" not in result.tensors:
        raise ValueError(f"This result has no top tokens; it has {', '.join(result.tensors)}. Make it with top_k=3.")
    axes = result.axes["top_ids"]
    down = next((axis for axis in ("sources", "prompts") if axis in axes), None)
    if down is None or "layers" not in axes:
        raise ValueError(f"top_ids has axes {', '.join(axes)}; a table of readings needs sources and layers.")
    ids, _, _ = pick(result, "top_ids", {}, down, "layers", "top")
    probabilities, _, _ = pick(result, "top_probs", {}, down, "layers", "top")
    name = namer(result, tokenizer)
    top_k = shown_tokens(top_k, ids.shape[1])
    texts = [[[name(token) for token in cell[:top_k]] for cell in column] for column in ids.astype(int)]
    own = {
        "sources": list(result.labels[down]),
        "layers": list(result.labels["layers"]),
        "title": title_of(result, "Patchscope"),
    }
    return texts, probabilities[..., :top_k], own


def _has(result: Any, name: str, how: str) -> str:
    if name not in result.tensors:
        raise ValueError(f"This result has no {name}; it has {', '.join(result.tensors)}. Make it with {how}.")
    return name


def _target_place(result: Any, prompt: int, target: int | None) -> int:
    """Where a target stands in one prompt's own list."""
    own = as_array(result.tensors["target_ids"], "target_ids", 2).astype(int)[prompt].tolist()
    if target is None:
        return 0
    if target not in own:
        raise ValueError(f"Token {target} is not among the targets of prompt {prompt}: {[i for i in own if i >= 0]}.")
    return own.index(target)


def _last_of_each(array: np.ndarray, axes: list[str]) -> np.ndarray:
    """The last position of each prompt that is not NaN."""
    moved = np.moveaxis(array, axes.index("positions"), -1)
    there = ~np.isnan(moved)
    last = np.where(there.any(-1), moved.shape[-1] - 1 - np.argmax(there[..., ::-1], axis=-1), 0)
    return np.take_along_axis(moved, last[..., None], -1)[..., 0]


def _target_labels(result: Any, kind: str) -> list[str]:
    labels = [str(label) for label in result.labels[kind]]
    if kind == "targets" and "target_ids" in result.tensors:
        ids = as_array(result.tensors["target_ids"], "target_ids", 2).astype(int)
        name = namer(result, None)
        labels = [
            name(column[0]) if len(set(column)) == 1 else f"target {i}" for i, column in enumerate(ids.T.tolist())
        ]
    return [f"{label} ({i})" if labels.count(label) > 1 else label for i, label in enumerate(labels)]


def _sweep_name(result: Any) -> str:
    """What was swept, as the function that made it calls it: "Activation patching of layers_output"."""
    about = getattr(result, "about", None) or {}
    name = str(about.get("function", "patching")).replace("_", " ").capitalize()
    values = about.get("arguments", {}).get("values")
    return f"{name} of {values[0]}" if isinstance(values, list) and len(values) == 1 else name


def score_name(result: Any, name: str) -> str:
    arguments = (getattr(result, "about", None) or {}).get("arguments", {})
    metric = arguments.get("metric")
    return str(metric).replace("_", " ") if isinstance(metric, str) and "<" not in metric else name.replace("_", " ")


def _quoted(text: Any) -> str:
    shown = visible(str(text)).replace("·", " ")
    return f"“{shown if len(shown) <= 60 else shown[:59] + '…'}”"


def _listed(labels: list[Any]) -> str:
    shown = [repr(label) for label in labels]
    return ", ".join(shown if len(shown) <= 12 else [*shown[:6], "…", *shown[-3:]])
