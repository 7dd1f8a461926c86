"""Find the parts of a model among vLLM's modules, by their types and by the source of their forwards.

There are no rules for single model families. `validate()` proves what is found here.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from vllm.model_executor.layers.linear import ReplicatedLinear, RowParallelLinear
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from nnterp.errors import AnatomyError


@dataclass(frozen=True)
class Block:
    """Native paths of the parts of one layer. A path is None if no such part was found; `reasons` says why.

    Attributes:
        path: The layer.
        attention, mlp: The attention and the feed-forward.
        core: The module inside attention that is given queries, keys and values.
        heads, kv_heads: The number of attention heads, and of key-value heads.
        w_out, w_down: The last projection of attention, and of the feed-forward.
        before_mlp: The norm that makes the feed-forward's input.
        reasons: Field → why it is None.
    """

    path: str
    attention: str | None
    mlp: str | None
    core: str | None
    heads: int
    kv_heads: int
    w_out: str | None
    w_down: str | None
    before_mlp: str | None
    reasons: dict[str, str]


@dataclass(frozen=True)
class Parts:
    """Native paths of a model's embedding, final norm, head and list of layers (`stack`), and its layers.

    `embedding_scale` is the name of the attribute by which embeddings are multiplied, of the module that holds the
    layers; None if there is none.
    """

    embed_tokens: str | None
    embedding_scale: str | None
    ln_final: str | None
    lm_head: str | None
    stack: str
    blocks: tuple[Block, ...]

    def names(self) -> list[tuple[str, str]]:
        """(standard path, native path) of each part that was found."""
        whole = {"embed_tokens": self.embed_tokens, "ln_final": self.ln_final, "lm_head": self.lm_head}
        found = [("layers", self.stack), *((name, path) for name, path in whole.items() if path is not None)]
        for i, block in enumerate(self.blocks):
            own = {"self_attn": block.attention, "mlp": block.mlp}
            found += [(f"layers.{i}.{name}", path) for name, path in own.items() if path is not None]
        return found


def find_parts(module: nn.Module) -> Parts:
    """Find the parts of a model that vLLM built. Its weights may be on `meta`.

    Raises:
        AnatomyError: It has no list of layers with attention, or several.
    """
    cores = [path for path, inner in module.named_modules() if is_core(inner)]
    stacks = {path for core in cores if (path := _stack_of(module, core)) is not None}
    if len(stacks) != 1:
        raise AnatomyError(
            f"vLLM's {type(module).__name__} has {len(stacks) or 'no'} lists of layers that hold attention "
            f"({', '.join(sorted(stacks))}); nnterp.vllm reads decoders with one. Load it with StandardizedTransformer."
        )
    stack = stacks.pop()
    owner = module.get_submodule(stack.rpartition(".")[0])
    layers = [path for path, _ in module.get_submodule(stack).named_children()]
    embeddings = [
        path
        for path, inner in module.named_modules()
        if isinstance(inner, VocabParallelEmbedding) and not isinstance(inner, ParallelLMHead)
    ]
    heads = [path for path, inner in module.named_modules() if isinstance(inner, ParallelLMHead)]
    norms = [name for name, inner in owner.named_children() if is_norm(inner) and _comes_after(owner, name, stack)]
    inside = stack.rpartition(".")[0]
    width = int(module.get_submodule(embeddings[0]).embedding_dim) if embeddings else 0  # type: ignore[arg-type]
    return Parts(
        embed_tokens=embeddings[0] if embeddings else None,
        embedding_scale=scale_of(owner, embeddings[0].rpartition(".")[2]) if embeddings else None,
        ln_final=f"{inside}.{norms[0]}" if len(norms) == 1 else None,
        lm_head=heads[0] if heads else None,
        stack=stack,
        blocks=tuple(_block(module, f"{stack}.{name}", cores, width) for name in layers),
    )


def is_core(module: nn.Module) -> bool:
    """Whether a module is vLLM's attention over paged keys and values."""
    return all(hasattr(module, name) for name in ("num_heads", "num_kv_heads", "head_size", "impl"))


def is_norm(module: nn.Module) -> bool:
    """Whether a module has a weight for each channel at most, and nothing inside."""
    shapes = [parameter.dim() for parameter in module.parameters()]
    return "norm" in type(module).__name__.lower() and all(dim == 1 for dim in shapes)


def _stack_of(module: nn.Module, core: str) -> str | None:
    pieces = core.split(".")
    paths = (".".join(pieces[:n]) for n in range(1, len(pieces)))
    return next((path for path in paths if isinstance(module.get_submodule(path), nn.ModuleList)), None)


def _comes_after(owner: nn.Module, name: str, stack: str) -> bool:
    order = [child for child, _ in owner.named_children()]
    return order.index(name) > order.index(stack.rpartition(".")[2])


def _block(module: nn.Module, path: str, cores: list[str], width: int) -> Block:
    layer = module.get_submodule(path)
    reasons: dict[str, str] = {}
    mine = [core for core in cores if core.startswith(f"{path}.")]
    attention = core = None
    if len(mine) == 1:
        core = mine[0]
        attention = f"{path}.{core.removeprefix(f'{path}.').split('.')[0]}"
    else:
        reasons["attention"] = f"{path} holds {len(mine) or 'no'} attentions of vLLM's"
    others = [
        name
        for name, child in layer.named_children()
        if f"{path}.{name}" != attention and not is_norm(child) and any(True for _ in child.parameters())
    ]
    mlp = f"{path}.{others[0]}" if len(others) == 1 else None
    if mlp is None:
        reasons["mlp"] = f"{path} has {len(others) or 'no'} modules that could be its feed-forward"
    w_out = _ending(module, attention, reasons, "w_out", width)
    w_down = _ending(module, mlp, reasons, "w_down", width)
    before = None if mlp is None else norm_before(layer, mlp.rpartition(".")[2])
    if before is None:
        reasons["before_mlp"] = f"in the forward of {type(layer).__name__}, no norm makes the feed-forward's input"
    attended = None if core is None else module.get_submodule(core)
    return Block(
        path=path,
        attention=attention,
        mlp=mlp,
        core=core,
        heads=0 if attended is None else int(attended.num_heads),  # type: ignore[arg-type]
        kv_heads=0 if attended is None else int(attended.num_kv_heads),  # type: ignore[arg-type]
        w_out=w_out,
        w_down=w_down,
        before_mlp=None if before is None else f"{path}.{before}",
        reasons=reasons,
    )


def _ending(module: nn.Module, path: str | None, reasons: dict[str, str], field: str, width: int) -> str | None:
    """The only projection that ends a part; None if there is not exactly one, with the reason in `reasons[field]`.

    vLLM splits its input over devices (`RowParallelLinear`). In vLLM's Transformers backend it may be one that is never
    split, as the projections that begin a part are; those that were fused, or that keep the width, are others.
    """
    if path is None:
        return None
    part = module.get_submodule(path)
    found = [f"{path}.{name}" for name, inner in part.named_modules() if isinstance(inner, RowParallelLinear)]
    found = found or [
        f"{path}.{name}"
        for name, inner in part.named_modules()
        if isinstance(inner, ReplicatedLinear) and inner.output_size == width
    ]
    experts = [name for name, inner in part.named_modules() if hasattr(inner, "w2_weight")]
    if len(found) == 1 and not experts:
        return found[0]
    reasons[field] = (
        f"{path} is a mixture, whose experts run inside one fused kernel"
        if experts
        else f"{path} has {len(found) or 'no'} projections that could end it"
    )
    return None


def norm_before(layer: nn.Module, mlp: str) -> str | None:
    """The name of a layer's child that makes the feed-forward's input, read from the source of the layer's forward.

    None if it is not a norm, or if something is computed between the two: then the norm's input is not the stream.
    """
    tree = _parsed(type(layer).forward)
    made: dict[str, str | None] = {}
    found: set[str | None] = set()
    for node in _in_order(tree):
        called = _child_called(node.value)
        if called == mlp and isinstance(node.value, ast.Call):
            given = [*node.value.args, *(keyword.value for keyword in node.value.keywords)]
            found |= {made.get(arg.id) for arg in given if isinstance(arg, ast.Name)}
        targets = node.targets[0]
        names = targets.elts if isinstance(targets, ast.Tuple) else [targets]
        for name in names[:1]:
            if isinstance(name, ast.Name):
                made[name.id] = called
    child = found.pop() if len(found) == 1 else None
    return child if child is not None and is_norm(layer.get_submodule(child)) else None


def _parsed(code: Any) -> ast.AST:
    """The source of a class or function; an empty one if it was made while the program ran."""
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(code)))
    except (OSError, TypeError):
        return ast.parse("")


def _in_order(tree: ast.AST) -> Iterator[ast.Assign]:
    assignments = [node for node in ast.walk(tree) if isinstance(node, ast.Assign)]
    yield from sorted(assignments, key=lambda node: node.lineno)


def _child_called(value: ast.expr) -> str | None:
    """`name` if the expression is a call `self.name(...)`, else None."""
    if not isinstance(value, ast.Call) or not isinstance(value.func, ast.Attribute):
        return None
    host = value.func.value
    return value.func.attr if isinstance(host, ast.Name) and host.id == "self" else None


def scale_of(owner: nn.Module, child: str) -> str | None:
    """`factor` if the source of a module's class has `self.child(...) * self.factor`, else None."""
    tree = _parsed(type(owner))
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult) and _child_called(node.left) == child:
            factor = node.right
            return factor.attr if isinstance(factor, ast.Attribute) and hasattr(owner, factor.attr) else None
    return None
