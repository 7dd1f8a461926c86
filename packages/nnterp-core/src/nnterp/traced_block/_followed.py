"""Refuse a `with` statement in which something follows the trace: it would be over when the model runs."""

from __future__ import annotations

import ast

RUNS = ("trace", "generate", "invoke")


def refuse_followed(node: ast.AST | None) -> None:
    """Raise if, in the `with` of a trace or of an invoke in it, another context manager follows it.

    nnsight runs the block when the trace is left, and what follows the trace has been left before that: `with
    model.trace(prompt), model.steering(vector):` would run a plain model.

    Raises:
        ValueError: There is such a `with`; says how to write it.
    """
    for statement in ast.walk(node) if node is not None else ():
        if not isinstance(statement, (ast.With, ast.AsyncWith)):
            continue
        for item, after in zip(statement.items, statement.items[1:], strict=False):
            call = item.context_expr
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr in RUNS:
                first, second = (ast.unparse(one.context_expr) for one in (item, after))
                raise ValueError(
                    f"`with {first}, {second}:` leaves {second} before the model runs. Write it first, `with {second}, "
                    f"{first}:`, or in a `with` of its own around the trace."
                )
