"""What a block reads of its model, found in its source."""

from __future__ import annotations

import ast
import builtins
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from nnsight.intervention.envoy import Envoy
from nnsight.intervention.tracer import InterleavingTracer

from nnterp.table import VALUES, Value
from nnterp.traced import LayerAccessor, ModuleListAccessor

FIRST = ("input_ids", "attention_mask", "input_size")  # available before the first layer alone
_LAST = ("logits", "next_token_probs", "output")
_SIZES = ("num_layers", "hidden_size", "vocab_size", "num_heads", "num_kv_heads", "head_dim", "intermediate_size")
_PLAIN = (*_LAST, *_SIZES, "tokenizer", "config", "device", "dtype", "attention_layers", "readout", "anatomy")
_BUILTINS = "len print float int str list tuple dict sorted min max sum abs repr".split()

Index = int | tuple[int, int] | None


@dataclass(frozen=True)
class Read:
    """A read at an index that stands in the source: `model.attentions_output[3]`, `model.token_embeddings`.

    Attributes:
        name: The value; an input of the model if it is no row of the table.
        layer: Its index; None for a value that is not per layer.
        node: The expression.
    """

    name: str
    layer: Index
    node: ast.expr


def names_of_model(body: list[ast.stmt], scope: Mapping[str, Any], model: Any) -> set[str]:
    """The names under which a block mentions its model: `model`, `self.model`."""
    return {_spelled(node) for node in _walk(body) if isinstance(node, ast.expr) and _found(node, scope) is model}


def _spelled(node: ast.AST) -> str:
    """A name, or a name's attribute, in text; "" for any other expression."""
    if isinstance(node, ast.Name):
        return node.id
    return (
        f"{node.value.id}.{node.attr}" if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) else ""
    )


def _found(node: ast.AST, scope: Mapping[str, Any]) -> Any:
    """The object of a name, or of a name's attribute, without running any code of its own."""
    if isinstance(node, ast.Name):
        return scope.get(node.id)
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        return getattr(scope.get(node.value.id), "__dict__", {}).get(node.attr)
    return None


def value_of(node: ast.AST, names: set[str]) -> Value | None:
    """The value that an expression `model.<value>` stands for; None for any other expression."""
    if isinstance(node, ast.Attribute) and _spelled(node.value) in names:
        return VALUES.get(node.attr)
    return None


def read_at(node: ast.AST, names: set[str]) -> Read | None:
    """The read that an expression is; None if it is none, or at an index that has to be computed."""
    if isinstance(node, ast.Subscript):
        value, index = value_of(node.value, names), _constant(node.slice)
        return Read(value.name, index, node) if value is not None and value.per_layer and index is not None else None
    value = value_of(node, names)
    if value is not None and not value.per_layer:
        return Read(value.name, None, node)  # type: ignore[arg-type]
    if isinstance(node, ast.Attribute) and node.attr in FIRST:
        return Read(node.attr, None, node) if _spelled(node.value) in names else None
    return None


def reads_of(body: list[ast.stmt], scope: Mapping[str, Any], model: Any) -> list[Read] | None:
    """The reads of a block that only reads, in the order of its source; None for a block that may do anything else.

    Args:
        body: The block's statements.
        scope: The variables around it.
        model: Its model.
    """
    names = names_of_model(body, scope, model)
    if not names or not all(_is_simple(statement) for statement in body):
        return None
    bound = {node.id for node in _walk(body) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    if names & bound:
        return None
    found: list[Read] = []
    for statement in body:
        if not _only_reads(statement, names, bound, scope, found):
            return None
    return found


def _is_simple(statement: ast.stmt) -> bool:
    """Whether a statement binds names or is an expression."""
    if isinstance(statement, ast.Assign):
        targets = [t for target in statement.targets for t in getattr(target, "elts", [target])]
        return all(isinstance(target, ast.Name) for target in targets)
    return isinstance(statement, (ast.Expr, ast.Pass))


def _only_reads(node: ast.AST, names: set[str], bound: set[str], scope: Mapping[str, Any], found: list[Read]) -> bool:
    """Whether nothing in an expression can change the run; puts its reads into `found`."""
    read = read_at(node, names)
    if read is not None:
        found.append(read)
        return True
    if isinstance(node, ast.Attribute) and _spelled(node.value) in names:
        return node.attr in _PLAIN
    if isinstance(_found(node, scope), (Envoy, LayerAccessor, ModuleListAccessor)):
        return False
    if isinstance(node, ast.Call) and not _is_harmless(node, names, bound, scope):
        return False
    if isinstance(node, (ast.Lambda, ast.NamedExpr, ast.Yield, ast.Await, ast.comprehension)):
        return False
    if isinstance(node, ast.Call) and _is_method(node.func, names, "project_on_vocab"):
        return all(_only_reads(inner, names, bound, scope, found) for inner in (*node.args, *node.keywords))
    return all(_only_reads(inner, names, bound, scope, found) for inner in ast.iter_child_nodes(node))


def _is_harmless(call: ast.Call, names: set[str], bound: set[str], scope: Mapping[str, Any]) -> bool:
    """Whether a call is one that is known to change nothing: of torch, a builtin, or a method of what was read."""
    function = call.func
    if any(keyword.arg in ("out", "inplace", None) for keyword in call.keywords):
        return False
    if _is_method(function, names, "project_on_vocab"):
        return True
    if isinstance(function, ast.Name):
        return function.id in _BUILTINS and scope.get(function.id) in (None, getattr(builtins, function.id))
    if not isinstance(function, ast.Attribute) or function.attr.endswith("_"):
        return False
    root: ast.AST = function
    while isinstance(root, (ast.Attribute, ast.Subscript, ast.Call)):
        if read_at(root, names) is not None:
            return True
        root = root.func if isinstance(root, ast.Call) else root.value
    if not isinstance(root, ast.Name):
        return True
    if function.attr == "stop" and isinstance(scope.get(root.id), InterleavingTracer):
        return True
    return root.id in bound or isinstance(scope.get(root.id), (ModuleType, list)) or root.id in names


def _is_method(function: ast.AST, names: set[str], name: str) -> bool:
    return isinstance(function, ast.Attribute) and function.attr == name and _spelled(function.value) in names


def _constant(node: ast.expr) -> Index:
    """An index that stands in the source: an integer, or two of them."""
    try:
        index = ast.literal_eval(node)
    except ValueError:
        return None
    pair = isinstance(index, tuple) and len(index) == 2
    entries = index if pair else (index,)
    return index if all(type(entry) is int for entry in entries) else None


def _walk(body: list[ast.stmt]) -> Iterator[ast.AST]:
    for statement in body:
        yield from ast.walk(statement)
