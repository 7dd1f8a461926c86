"""The lines of a block in the order that works, for the error of one that reads in another."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from nnterp.errors import Unavailable
from nnterp.named_transformer import NamedTransformer
from nnterp.table import VALUES
from nnterp.traced_block._order import by_probe, by_table
from nnterp.traced_block._reads import Read, read_at, value_of

_Key = tuple[float, float]


def lines_in_order(model: NamedTransformer, body: list[ast.stmt], names: set[str]) -> str:
    """The statements that stand in the wrong order, in the right one, a line each; "" if there are none.

    Statements with the same computed index (`model.layers_output[i]`) are sorted among themselves.

    Args:
        model: The model.
        body: The block's statements.
        names: What the block calls the model.
    """
    for suite in _suites(body):
        keys: dict[int, _Key] = {}
        indices = set()
        for i, statement in enumerate(suite):
            for node in ast.walk(statement):
                index = _index(node, names)
                if index is not None:
                    indices.add(index)
                    key = _key(model, node, names)
                    keys[i] = max(keys[i], key) if i in keys else key
        if len(indices - {""}) > 1:  # several computed indices, or some beside constants: their order is not known
            continue
        order = sorted(keys, key=lambda i: keys[i])
        if order != sorted(order) and _needs_nothing_later(suite, order):
            return "\n".join(f"    {ast.unparse(suite[i])}" for i in order)
    return ""


def _needs_nothing_later(suite: list[ast.stmt], order: list[int]) -> bool:
    """Whether no statement uses a name that is bound only further down in this order."""
    bound = [{n.id for n in _names(suite[i]) if isinstance(n.ctx, ast.Store)} for i in order]
    used = [{n.id for n in _names(suite[i]) if isinstance(n.ctx, ast.Load)} for i in order]
    return not any(used[k] & bound[later] for k in range(len(order)) for later in range(k + 1, len(order)))


def _names(statement: ast.stmt) -> Iterator[ast.Name]:
    return (node for node in ast.walk(statement) if isinstance(node, ast.Name))


def _suites(body: list[ast.stmt]) -> Iterator[list[ast.stmt]]:
    """Lists of simple statements that run one after the other: the block's, and those of its loops and branches."""
    yield [statement for statement in body if not hasattr(statement, "body")]
    for statement in body:
        for field in ("body", "orelse"):
            inner = getattr(statement, field, None)
            if isinstance(inner, list):
                yield from _suites(inner)


def _index(node: ast.AST, names: set[str]) -> str | None:
    """The computed index of a read in text, "" for a constant; None if the node reads nothing."""
    if read_at(node, names) is not None:
        return ""
    if isinstance(node, ast.Subscript) and value_of(node.value, names) is not None:
        return ast.unparse(node.slice)
    return None


def _key(model: NamedTransformer, node: ast.AST, names: set[str]) -> _Key:
    """When a read comes: by the probe where it is known, else by the table."""
    read = read_at(node, names)
    if read is None:
        value = value_of(node.value, names)  # type: ignore[attr-defined]
        assert value is not None
        read = Read(value.name, 0, node)  # type: ignore[arg-type]
    try:
        return by_probe(model, read)
    except (Unavailable, KeyError, IndexError, TypeError):
        return by_table(read.name, read.layer, model.num_layers) if read.name in VALUES else (-2, -2)
