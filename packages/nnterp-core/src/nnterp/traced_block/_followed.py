"""Refuse a `with` statement in which a steering follows the trace: it would be over when the model runs."""

from __future__ import annotations

import ast

RUNS = ("trace", "generate", "invoke")
HELD = ("steering", "freeze", "edit", "trace", "generate")  # what changes runs, or is one


def refuse_followed(node: ast.AST | None) -> None:
    """Raise if, in the `with` of a trace or of an invoke in it, something that changes runs follows it.

    nnsight runs the block when the trace is left, and what follows the trace has been left before that: `with
    model.trace(prompt), model.steering(vector):` would run a plain model.

    Raises:
        ValueError: There is such a `with`; says how to write it.
    """
    for statement in ast.walk(node) if node is not None else ():
        if not isinstance(statement, (ast.With, ast.AsyncWith)):
            continue
        for number, item in enumerate(statement.items):
            after = next((one for one in statement.items[number + 1 :] if _called(one) in HELD), None)
            if _called(item) in RUNS and after is not None:
                first, second = (ast.unparse(one.context_expr) for one in (item, after))
                raise ValueError(
                    f"`with {first}, {second}:` leaves {second} before the model runs. Write it first, `with {second}, "
                    f"{first}:`, or in a `with` of its own around the trace."
                )


def _called(item: ast.withitem) -> str:
    """The last name of what an item of a `with` calls; "" if it is no call."""
    called = item.context_expr.func if isinstance(item.context_expr, ast.Call) else None
    return called.attr if isinstance(called, ast.Attribute) else called.id if isinstance(called, ast.Name) else ""
