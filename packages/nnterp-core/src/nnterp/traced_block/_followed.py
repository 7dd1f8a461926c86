"""Refuse a `with` statement in which a steering or the like follows the trace: it is over when the model runs."""

from __future__ import annotations

import ast
import math
from collections.abc import Iterable, Mapping
from itertools import islice
from types import FrameType
from typing import Any, TypeAlias, cast

from nnsight.tracing.tracer import Tracer, skippable

RUNS = ("trace", "generate", "session", "invoke")
Place: TypeAlias = tuple[int, int, int, int]  # line and last line, column and last column, as Python tells them
HARMLESS = ("no_grad", "inference_mode")  # numbers do not depend on these


class LastInWith(Tracer):
    """A tracer that raises, as it is entered, if something follows it in its `with`, or if the block is on that line.

    nnsight runs the block when the trace is left, and what follows the trace has been left before that: `with
    model.trace(prompt), model.steering(vector):` would run a plain model. What follows may have been made anywhere
    (`with model.trace(prompt), steering:`), and so may the tracer, so all of it is refused, except torch's `no_grad`
    and `inference_mode`. An invoke needs a `with` of its own too: nnsight cannot run one in the `with` of its trace.

    A block on the line of its `with` cannot be run by nnsight. If the `with` is another's, such as that of a steering,
    nnsight would take a call of `model.generate` in the block for a trace that is entered there.

    Raises:
        ValueError: Something follows it, or the block begins on the line of the `with`; says how to write it.
    """

    @property
    def info(self) -> Any:  # type: ignore[override]
        """nnsight's record of the block. It is written as the tracer is entered."""
        return self.__dict__.get("info")

    @info.setter
    def info(self, found: Tracer.Info | None) -> None:
        self.__dict__["info"] = found  # under its own name, because the state of a tracer is sent
        if found is None or self.node is None:
            return
        if self.node.body[0].lineno == self.node.lineno and skippable(self.node):
            raise ValueError(
                "nnsight takes a call on the line of a `with` for that `with`, and runs the block itself. Begin the "
                f"block on a line of its own:\n{ast.unparse(self.node)}"
            )
        if len(self.node.items) == 1:
            return
        number = entered(self.node.items, found.frame)
        if number is None:
            refuse_followed(self.node, self, {**found.frame.f_globals, **found.frame.f_locals}, nested=False)
        else:
            _refuse_after(self.node.items, number)


def entered(items: list[ast.withitem], frame: FrameType) -> int | None:
    """Which item of a `with` is being entered: the one whose expression was computed last.

    Args:
        items: The items. Their columns may differ from those of the code by the indentation of the `with`, which
            nnsight takes away before it parses.
        frame: Where the `with` runs.

    Returns:
        Its index; None if it cannot be told (`python -X no_debug_ranges`).
    """
    places = _known(frame.f_code.co_positions())
    before = _known(islice(frame.f_code.co_positions(), frame.f_lasti // 2 + 1))
    wholes = [_whole(item.context_expr) for item in items]
    moved: dict[int, int] = {}
    for line in sorted({whole[0] for whole in wholes}):
        found = [
            {place[2] - whole[2] for place in places if place[:2] == whole[:2] and _width(place) == _width(whole)}
            for whole in wholes
            if whole[0] == line
        ]
        # Names of one width are alike: nothing stands before the first item, and no line moves further than its own.
        most = moved[wholes[0][0]] if moved else math.inf
        if not (common := [by for by in set.intersection(*found) if 0 <= by <= most]):
            return None
        moved[line] = max(common) if moved else min(common)
    for line, last, column, end in reversed(before):
        # From the last: where an item ends on the line on which the next begins, it would take that one's columns.
        for number, (first, final, begin, until) in reversed(tuple(enumerate(wholes))):
            inside = (first, begin + moved[first]) <= (line, column) and last <= final
            if inside and (first < final or end <= until + moved[first]):
                return number
    return None


def _known(places: Iterable[tuple[int | None, ...]]) -> list[Place]:
    return [cast("Place", place) for place in places if None not in place]


def _whole(expression: ast.expr) -> Place:
    last, end = expression.end_lineno, expression.end_col_offset
    assert last is not None
    assert end is not None
    return expression.lineno, last, expression.col_offset, end


def _width(place: Place) -> int:
    """The columns of a place on one line; those of others depend on the indentation of their last line."""
    return place[3] - place[2] if place[0] == place[1] else 0


def refuse_followed(
    node: ast.AST | None, tracer: Any = None, scope: Mapping[str, Any] | None = None, nested: bool = True
) -> None:
    """Raise if, in the `with` of a trace, a session or an invoke, or in one in its block, something follows it.

    Told by names, for blocks in which nnterp's tracers do not run; see `LastInWith`.

    Args:
        node: The `with` statement.
        tracer: What runs its block; found where a name stands for it.
        scope: The variables that the block sees.
        nested: Look at the statements in its block too.

    Raises:
        ValueError: There is such a `with`; says how to write it.
    """
    for statement in () if node is None else ast.walk(node) if nested else (node,):
        if not isinstance(statement, (ast.With, ast.AsyncWith)):
            continue
        for number, item in enumerate(statement.items):
            named = item.context_expr.id if isinstance(item.context_expr, ast.Name) else ""
            if _called(item) in RUNS or (tracer is not None and (scope or {}).get(named) is tracer):
                _refuse_after(statement.items, number)


def _refuse_after(items: list[ast.withitem], number: int) -> None:
    after = next((one for one in items[number + 1 :] if _called(one) not in HARMLESS), None)
    if after is None:
        return
    first, second = (ast.unparse(one.context_expr) for one in (items[number], after))
    where = f"first, `with {second}, {first}:`, or in a `with` of its own around it"
    if _called(after) in RUNS:
        where = "in a `with` of its own, in the block"
    raise ValueError(f"`with {first}, {second}:` leaves {second} before the model runs. Write it {where}.")


def _called(item: ast.withitem) -> str:
    """The last name of what an item of a `with` calls; "" if it is no call."""
    called = item.context_expr.func if isinstance(item.context_expr, ast.Call) else None
    return called.attr if isinstance(called, ast.Attribute) else called.id if isinstance(called, ast.Name) else ""
