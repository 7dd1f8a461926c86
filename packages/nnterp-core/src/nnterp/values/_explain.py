"""Say in words where a value is served: native path, source lines, layout, and what is available on which layers."""

from __future__ import annotations

import contextlib
import html
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nnterp.discovery import ContextFact
from nnterp.errors import Unavailable
from nnterp.indices import integer, read_index
from nnterp.rendering import GOOD, SOFT, FittedTable, html_table
from nnterp.table import VALUES, Value, get_value
from nnterp.traced import (
    CachedState,
    Declared,
    EveryExpert,
    Everywhere,
    Experts,
    Features,
    InRun,
    Inside,
    Item,
    Place,
    ReadOnly,
    Routed,
    Site,
    State,
    Sum,
    ThroughOut,
    View,
)
from nnterp.values._lookup import Known
from nnterp.values._stacks import stack_depth
from nnterp.wording import ranges

if TYPE_CHECKING:
    from rich.console import RenderableType

_HEADER = ("value", "where", "why not elsewhere")


@dataclass(frozen=True)
class Support:
    """Which values of the table one model has.

    Attributes:
        layers: Value → the layers that have it; `()` for none, `(-1,)` for a value that is not per layer.
        reasons: Value → for a layer (or -1) that does not have it, why.
        context: What the model does around its layers: factors on embeddings, residuals and logits, further tables.
    """

    model_class: str
    layers: dict[str, tuple[int, ...]]
    reasons: dict[str, dict[int, str]]
    context: tuple[ContextFact, ...] = ()

    def __getitem__(self, value: str) -> tuple[int, ...]:
        """The layers that have a value."""
        return self.layers[value]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def available(self, value: str, layer: int | None = None) -> bool:
        """Check whether a value is there, on one layer (a negative one counts from the last) or on any; returns True if
        it is.

        Raises:
            ValueError: There is no such value.
            TypeError: The layer is no integer.
        """
        have = self.layers[get_value(value).name]
        if layer is None:
            return bool(have)
        index = integer(layer, "layer")
        if index < 0 and VALUES[value].per_layer:
            index += 1 + max(*have, *self.reasons[value])
        return index in have

    def missing(self) -> dict[str, dict[int, str]]:
        """List the values that some layer lacks; returns value → layer → the reason."""
        return {name: reasons for name, reasons in self.reasons.items() if reasons}

    def rows(self) -> list[tuple[str, str, str]]:
        """Make the table that is printed.

        Returns:
            (value, layers that have it, why the others have not) of each value, as texts.
        """
        rows = []
        for name, layers in self.layers.items():
            where = "–" if not layers else ("available" if layers == (-1,) else f"layers {ranges(layers, at_most=6)}")
            rows.append((name, where, "; ".join(dict.fromkeys(self.reasons[name].values()))))
        return rows

    @property
    def _caption(self) -> str:
        return f"Values of {self.model_class}"

    @property
    def _colours(self) -> list[str]:
        return [GOOD if self.layers[name] else SOFT for name in self.layers]

    def __str__(self) -> str:
        rows = self.rows()
        width, second = max(len(r[0]) for r in rows), max(len(r[1]) for r in rows)
        lines = [f"{self._caption}:", *(f"  {a:<{width}}  {b:<{second}}  {c}".rstrip() for a, b, c in rows)]
        return "\n".join([*lines, *_listed(self.context)])

    def _repr_html_(self) -> str:
        table = html_table(self._caption, _HEADER, self.rows(), colours=self._colours)
        return table + "".join(f"<p>{html.escape(str(fact))}</p>" for fact in self.context)

    def __rich__(self) -> RenderableType:
        from rich.console import Group

        table = FittedTable(self._caption, _HEADER, self.rows(), colours=self._colours)
        return Group(table, *_listed(self.context)) if self.context else table


def support(model: Known) -> Support:
    """See `StandardizedTransformer.support`.

    Returns:
        As that method.
    """
    layers: dict[str, tuple[int, ...]] = {}
    reasons: dict[str, dict[int, str]] = {}
    for name, value in VALUES.items():
        have, why = [], {}
        for layer in _layers(model, value) if value.per_layer else [-1]:
            try:
                with contextlib.suppress(ValueError):  # several dictionaries, which have features each
                    model.place(name, layer if value.per_layer else None)
                have.append(layer)
            except Unavailable as error:
                why[layer] = error.reason or str(error).partition(") has ")[2] or str(error)
        layers[name], reasons[name] = tuple(have), why
    return Support(model.facts.anatomy.model_class, layers, reasons, context_of(model))


def context_of(model: Known) -> tuple[ContextFact, ...]:
    """What the model does around its layers; nothing for a model that nothing has run, as on fake tensors."""
    return () if model.facts.look_for_context is None else model.facts.context


def explain_context(model: Known) -> str:
    """See `StandardizedTransformer.explain`, of the model as a whole.

    Returns:
        The text that it prints.

    Raises:
        Unproven: Nothing has run the model yet.
    """
    lines = _listed(model.facts.context)
    name = model.facts.anatomy.model_class
    return "\n".join([f"{name}, around its layers:", *lines[1:]]) if lines else f"{name}: {_NOTHING}"


_NOTHING = (
    "what enters the first layer is a row of the embedding table, and layers and head add and return what they make as "
    "it is."
)


def _listed(context: Sequence[ContextFact]) -> list[str]:
    return ["Around the layers:", *(f"  {fact}" for fact in context)] if context else []


def _layers(model: Known, value: Value) -> range:
    """The layers of the stack that a value is of; of an encoder that the model lacks, one."""
    try:
        return range(stack_depth(model.facts, value))
    except Unavailable:
        return range(1)


def explain(model: Known, value: Value, layer: int | tuple[int, int] | None) -> str:
    """See `StandardizedTransformer.explain`.

    Returns:
        The text that it prints.
    """
    index: int | tuple[int, int] | None = None
    if value.per_layer:
        index = 0 if layer is None else layer
        if not isinstance(layer, tuple):
            index = read_index(index, stack_depth(model.facts, value), f"The layer of {value.name}", "layers")
    place = model.place(value.name, index)
    shape = value.shape
    at = "" if index is None else f"[{', '.join(map(str, index if isinstance(index, tuple) else (index,)))}]"
    lines = [f"{value.name}{at}: {value.description}", f"  shape  {shape}"]
    if value.note:
        lines.append(f"  note   {value.note}")
    lines.append(f"  rank   {value.rank:g} in the forward order of {'a layer' if value.per_layer else 'the model'}")
    if value.aliases:
        lines.append(f"  TransformerLens  {', '.join(a.format(index) for a in value.aliases)}")
    lines.append(f"  read at  {place}")
    source = source_of(model, place)
    return "\n".join([*lines, source] if source else lines)


def source_of(model: Known, place: Place) -> str:
    """Find the source lines at which a place is: the operation's own, or where its module is called from.

    Returns:
        The lines with their file, as text; empty if there are none.
    """
    if isinstance(place, (View, ReadOnly, State, InRun)):
        return source_of(model, place.place)
    if isinstance(place, ThroughOut):
        return source_of(model, place.heads)
    if isinstance(place, Features):
        return source_of(model, place.read_place)
    if isinstance(place, Everywhere):
        return source_of(model, place.places[0])
    if isinstance(place, Sum):
        return "\n".join(_module_line(model, path) for path, _ in place.terms)
    if isinstance(place, Site | Item | Routed | Experts | EveryExpert):
        return _module_line(model, place.path)
    if isinstance(place, Declared):
        return str(place.source)
    if isinstance(place, CachedState):
        return _module_line(model, place.path)
    if isinstance(place, Inside):
        return _operation_lines(model, place)
    return ""


def _module_line(model: Known, path: str) -> str:
    module = model._module.get_submodule(path)
    try:
        file, line = inspect.getsourcefile(type(module)), inspect.getsourcelines(type(module))[1]
    except (OSError, TypeError):
        return f"  {path}: {type(module).__name__}"
    return f"  {path}: {type(module).__name__}, {file}:{line}"


def _operation_lines(model: Known, place: Inside, around: int = 3) -> str:
    """A window of the function in which the operation stands, its line marked."""
    key = (place.path, place.labels[:-1])
    found = model.facts.inside.texts.get(key) or model.facts.states[1].get(key) or model.facts.linear[1].get(key)
    if found is None:
        return f"  {place}"
    at = found.lines[place.labels[-1]] - 1
    lines = found.text.split("\n")
    shown = range(max(0, at - around), min(len(lines), at + around + 1))
    window = [f"  {'-->' if i == at else '   '} {found.start + i:5d}  {lines[i]}" for i in shown]
    return "\n".join([f"  {found.file}", *window])
