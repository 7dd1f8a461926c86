"""Refuse a `with` statement in which a steering or the like follows the trace: it is over when the model runs."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

RUNS = ("trace", "generate", "session", "invoke")
HARMLESS = ("no_grad", "inference_mode")  # numbers do not depend on these


def refuse_followed(node: ast.AST | None, tracer: Any = None, scope: Mapping[str, Any] | None = None) -> None:
    """Raise if, in the `with` of a trace, a session or an invoke, or in one in its block, something follows it.

    nnsight runs the block when the trace is left, and what follows the trace has been left before that: `with
    model.trace(prompt), model.steering(vector):` would run a plain model. What follows may have been made anywhere
    (`with model.trace(prompt), steering:`), so all of it is refused, except torch's `no_grad` and
    `inference_mode`. An invoke needs a `with` of its own too: nnsight cannot run one in the `with` of its trace.

    Args:
        node: The `with` statement.
        tracer: What runs its block; found where a name stands for it.
        scope: The variables that the block sees.

    Raises:
        ValueError: There is such a `with`; says how to write it.
    """
    for statement in ast.walk(node) if node is not None else ():
        if not isinstance(statement, (ast.With, ast.AsyncWith)):
            continue
        for number, item in enumerate(statement.items):
            after = next((one for one in statement.items[number + 1 :] if _called(one) not in HARMLESS), None)
            named = item.context_expr.id if isinstance(item.context_expr, ast.Name) else ""
            runs = _called(item) in RUNS or (tracer is not None and (scope or {}).get(named) is tracer)
            if runs and after is not None:
                first, second = (ast.unparse(one.context_expr) for one in (item, after))
                where = f"first, `with {second}, {first}:`, or in a `with` of its own around it"
                if _called(after) in RUNS:
                    where = "in a `with` of its own, in the block"
                raise ValueError(f"`with {first}, {second}:` leaves {second} before the model runs. Write it {where}.")


def _called(item: ast.withitem) -> str:
    """The last name of what an item of a `with` calls; "" if it is no call."""
    called = item.context_expr.func if isinstance(item.context_expr, ast.Call) else None
    return called.attr if isinstance(called, ast.Attribute) else called.id if isinstance(called, ast.Name) else ""
