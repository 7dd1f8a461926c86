"""Edits of what was read of features and has no name: `model.features[4][:, :, 7] = 0` edits a tensor that is gone."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from typing import Any

from nnterp.traced_block._reads import names_of_model, value_of

_NO_EDITS = ("requires_grad_", "detach_")


def refuse_lost_edits(model: Any, node: Any, scope: Mapping[str, Any]) -> None:
    """Raise if a block edits features where it reads them: what is read is a new tensor, so nothing would change.

    Args:
        model: The model that is traced.
        node: The `with` statement.
        scope: The variables that its block sees.

    Raises:
        ValueError: It does; shows the line, and lines that work.
    """
    names = names_of_model(node.body, scope, model)
    for statement in (inner for outer in node.body for inner in ast.walk(outer) if isinstance(inner, ast.stmt)):
        if hasattr(statement, "body"):
            continue  # its statements come by themselves
        for edited in (tensor for inner in ast.walk(statement) for tensor in _edited(inner)):
            read = _read_of_features(edited, names)
            if read is not None:
                whole, text = ast.unparse(read), ast.unparse(statement)
                raise ValueError(
                    f"`{text}` would change nothing: {whole} makes a new tensor, and nothing keeps this one. "
                    f"Edit it under a name and assign it:\n    features = {whole}\n"
                    f"    {text.replace(whole, 'features', 1)}\n    {whole} = features"
                )


def _edited(node: ast.AST) -> Iterator[ast.expr]:
    """What a statement or call edits in place: the tensor that it assigns into, or that of a method such as `zero_`."""
    if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
        yield node.value
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        name = node.func.attr
        if name.endswith("_") and not name.startswith("_") and name not in _NO_EDITS:
            yield node.func.value


def _read_of_features(edited: ast.expr, names: set[str]) -> ast.Subscript | None:
    """The read `model.features[...]` that a tensor is, or is a part of; None if it is another tensor."""
    while isinstance(edited, ast.Subscript):
        value = value_of(edited.value, names)
        if value is not None and value.name == "features":
            return edited
        edited = edited.value
    return None
