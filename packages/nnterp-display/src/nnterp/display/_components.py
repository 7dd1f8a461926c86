"""What parts of a model do alone: ablations and patched paths, as a map by layer and head or as a list of bars."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from nnterp.display import _adapt
from nnterp.display._arrays import as_array, number
from nnterp.display._grid import check_same, fit, label_pixels, number_ticks
from nnterp.display._patching import plot_patching
from nnterp.display._text import escape
from nnterp.display._theme import DIVERGING, MONO, new_figure, shown
from nnterp.token_text import shorten

_LABEL = re.compile(r"(?P<value>\w+)\[(?P<layer>\d+)\](?: head (?P<head>\d+))?(?P<rest> at .*)?$")
_LABEL_COLUMNS = 48  # longer names are cut; hovering shows all of them
_BAR = 24


def plot_components(
    scores: Any,
    components: Sequence[Any] | None = None,
    *,
    baseline: float | None = None,
    score: str = "score",
    title: str | None = None,
    show: bool = False,
    **choose: Any,
) -> go.Figure:
    """How much each component's ablation, or its patched path, changes a score.

    Components that are single heads of layers (or whole parts, one column for each kind) make a map, layer up and head
    across; others a bar each, in their order, from the top.

    Args:
        scores: `[components]`, or the result object of `ablate` or `path_patching` of `nnterp.interventions`.
        components: Their names; 0, 1, … if None.
        baseline: What the score is when nothing is changed; 0 if None. A result object brings its own.
        score: What the score is, with its unit ("logit difference").
        title: Plain text.
        show: Also show the figure, in a notebook or a browser.
        **choose: For a result of several prompts, which one to draw (`prompts="..."`), or `prompts="mean"`.

    Returns:
        The figure, of the changes from the baseline, coloured from −m to m around zero.

    Raises:
        ValueError: Names do not fit, or the result has several prompts and none was chosen.
    """
    if _adapt.is_numbers(scores):
        if choose:
            raise TypeError(
                f"plot_components() has no argument {next(iter(choose))!r}; axes are chosen of a result object only."
            )
        values = as_array(scores, "scores ([components])", 1)
        change = values - (0.0 if baseline is None else baseline)
    else:
        values, change, own = from_result(scores, choose)
        components = own["components"] if components is None else components
        score, title = own["score"] if score == "score" else score, own["title"] if title is None else title
    names = [str(i) for i in range(len(values))] if components is None else [str(name) for name in components]
    check_same("components", len(names), len(values), "scores")
    label = f"change of {score}"
    placed = _grid_of(names)
    if placed is not None:
        layers, columns, axis, places = placed
        cells = np.full((len(layers), len(columns)), np.nan)
        for (row, column), number_ in zip(places, change, strict=True):
            cells[row, column] = number_
        return plot_patching(cells, columns, layers=layers, column_axis=axis, score=label, title=title, show=show)
    return _bars(names, values, change, score, label, title, show)


def from_result(result: Any, choose: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """`[components]` scores and their changes from the run in which nothing is changed, with the labels."""
    _adapt.require_result(result, "plot_components")
    name = next(iter(result.tensors))
    axes = list(result.axes[name])
    along = next((axis for axis in ("components", "senders") if axis in axes), None)
    if along is None:
        raise ValueError(f"{name} has axes {', '.join(axes)}; bars are drawn of components or senders.")
    about = getattr(result, "about", None) or {}
    arguments = about.get("arguments", {})
    unchanged = "baseline"
    if unchanged not in result.tensors:
        unchanged = "clean" if arguments.get("direction") == "noising" else "corrupted"
    values, _, taken = _adapt.pick(result, name, choose, along)
    if unchanged in result.tensors:
        base, _, _ = _adapt.pick(result, unchanged, {k: v for k, v in choose.items() if k != along})
    else:
        base = np.zeros(())
    if along in choose:
        values, names = values[None], [result.labels[along][taken[along]]] if along in taken else ["mean"]
    else:
        names = list(result.labels[along])
    where = "mean over prompts" if choose.get("prompts") == "mean" else ""
    if "prompts" in taken and len(result.labels["prompts"]) > 1:
        where = f"prompt {result.labels['prompts'][taken['prompts']]}"
    function = str(about.get("function", "")).replace("_", " ")
    words = {"ablate": "Ablation", "path patching": "Path patching"}.get(function, function.capitalize())
    how = arguments.get("how")
    details = ", ".join(filter(None, [how if isinstance(how, str) and "<" not in how else "", where]))
    return (
        values,
        values - base,
        {
            "components": names,
            "score": _adapt.score_name(result, name),
            "title": _adapt.title_of(result, f"{words}{f' ({details})' if details else ''}"),
        },
    )


def _grid_of(names: Sequence[str]) -> tuple[list[int], list[str], str, list[tuple[int, int]]] | None:
    """Layers, columns and each component's place, where the names are those of single parts of two layers or more."""
    found = [_LABEL.fullmatch(name) for name in names]
    if not found or not all(found):
        return None
    parts = [match.groupdict() for match in found if match is not None]
    values, rests = {p["value"] for p in parts}, {p["rest"] for p in parts}
    if len(rests) > 1:
        return None
    by_head = all(p["head"] is not None for p in parts)
    if by_head and len(values) == 1:
        keys: list[Any] = [int(p["head"]) for p in parts]
        columns, axis = sorted(set(keys)), "head"
    else:
        endings = {value.rpartition("_")[2] for value in values}
        same = f"_{endings.pop()}" if len(endings) == 1 and len(values) > 1 else ""
        axis = f"part ({same[1:]})" if same else "part"
        keys = [p["value"].removesuffix(same) + (f" head {p['head']}" if p["head"] is not None else "") for p in parts]
        columns = list(dict.fromkeys(keys))
    layers = sorted({int(p["layer"]) for p in parts})
    places = [(layers.index(int(p["layer"])), columns.index(key)) for p, key in zip(parts, keys, strict=True)]
    if len(layers) < 2 or len(columns) < 2 or len(set(places)) < len(places) or (axis != "head" and len(columns) > 8):
        return None
    return layers, [str(column) for column in columns], axis, places


def _bars(
    names: Sequence[str], values: np.ndarray, change: np.ndarray, score: str, label: str, title: str | None, show: bool
) -> go.Figure:
    rows = list(range(len(names)))
    most = float(np.nanmax(np.abs(change))) if len(rows) and not np.isnan(change).all() else 0.0
    cut = [shorten(name, _LABEL_COLUMNS) for name in names]
    figure = new_figure(title)
    figure.add_trace(
        go.Bar(
            x=change,
            y=rows,
            orientation="h",
            hovertext=[
                f"{escape(name)}<br>{escape(label)} {number(moved)}<br>{escape(score)} {number(value)}"
                for name, value, moved in zip(names, values, change, strict=True)
            ],
            hovertemplate="%{hovertext}<extra></extra>",
            marker={
                "color": change,
                "colorscale": DIVERGING,
                "reversescale": True,
                "cmin": -(most or 1.0),
                "cmax": most or 1.0,
            },
        )
    )
    every = number_ticks(rows, _BAR)["tickvals"]
    figure.update_yaxes(
        tickmode="array",
        tickvals=every,
        ticktext=[escape(cut[i]) for i in every],
        tickfont={"family": MONO, "size": 11},
        showgrid=False,
        zeroline=False,
        automargin=True,
        range=[len(rows) - 0.5, -0.5],
    )
    figure.update_xaxes(title_text=escape(label), zeroline=True)
    left = max((label_pixels([name]) if len(name) <= 18 else round(len(name) * 6.7) + 8) for name in cut or [""])
    return shown(fit(figure, width=420, height=max(len(rows) * _BAR, 60), left=left + 16, bottom=64, right=40), show)
