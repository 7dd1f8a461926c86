"""Walk autograd's graph from one tensor back to another, and say what on the way is not linear."""

from __future__ import annotations

from collections.abc import Iterable, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import GradientEdge, Node

# Operations that are linear in every tensor they are given; autograd's names, without "Backward0".
_LINEAR = frozenset(
    """
    Add Sub Rsub Neg Sum Mean Cumsum Alias Clone Copy ToCopy View UnsafeView Reshape ReshapeAlias Expand Repeat
    RepeatInterleave
    Squeeze Unsqueeze Transpose T Permute Slice Select Split SplitWithSizes UnsafeSplit Unbind Chunk Cat
    Stack Index IndexSelect IndexAdd IndexPut Gather Scatter ScatterAdd SelectScatter SliceScatter Narrow Flip Roll Tril
    Triu Diagonal AsStrided ConstantPadNd MaskedFill MaskedScatter MaskedSelect Where Embedding Detach Identity Unfold
    Flatten Movedim Swapaxes Real ViewAsReal ViewAsComplex Imag TakeAlongDim Dropout NativeDropout Trace
    """.split()
)
# Operations of two tensors, linear in each: (edges of the factors), of which one may depend on the stream.
_PRODUCTS: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("Mul", "Mm", "Bmm", "Mv", "Dot", "Linear", "Einsum", "GroupedMm", "Convolution"), (0, 1)),
    **dict.fromkeys(("Addmm", "Baddbmm", "Addbmm", "Addmv", "Addcmul"), (1, 2)),
}


def edge(tensor: torch.Tensor) -> GradientEdge:
    """Where a tensor stands in the graph now: operations in place move it on."""
    return torch.autograd.graph.get_gradient_edge(tensor)


@dataclass(frozen=True)
class Way:
    """What autograd's graph holds between some tensors and one that was made of them.

    Attributes:
        depends: Whether it depends on them at all.
        bad: Autograd's names of the operations on the way that are not linear, each once.
        leaves: The parameters that enter on the way, such as biases.
        nodes: The operations on the way.
    """

    depends: bool
    bad: tuple[str, ...] = ()
    leaves: tuple[torch.Tensor, ...] = ()
    nodes: tuple[Node, ...] = ()


def way(end: GradientEdge, start: Iterable[GradientEdge], known: Set[Node] = frozenset()) -> Way:
    """Walk back from one place in the graph to others.

    Args:
        end, start: Places in the graph, from `torch.autograd.graph.get_gradient_edge`.
        known: Operations that were judged already.

    Returns:
        Whether the walk reaches them, and what it passes.
    """
    live: dict[Node, bool] = dict.fromkeys((e.node for e in start), True)
    leaves: list[torch.Tensor] = []
    stack: list[tuple[Node, bool]] = [(end.node, False)]
    order: list[Node] = []
    while stack:  # depth first, a node after what it was made of
        node, done = stack.pop()
        if done:
            live[node] = any(live.get(n, False) for n, _ in node.next_functions if n is not None)
            if live[node]:
                order.append(node)
        elif node not in live:
            live[node] = False
            stack.append((node, True))
            stack.extend((n, False) for n, _ in node.next_functions if n is not None and n not in live)
            if isinstance(variable := getattr(node, "variable", None), nn.Parameter):
                leaves.append(variable)
    bad = [name for node in order if node not in known and (name := _not_linear(node, live))]
    return Way(live[end.node], tuple(dict.fromkeys(bad)), tuple(leaves), tuple(order))


def _not_linear(node: Node, live: dict[Node, bool]) -> str:
    """The name of an operation that is not linear in what depends on the start; "" if it is linear."""
    full = node.name()
    if isinstance(node, torch.autograd.function.BackwardCFunction) and "grouped_mm" not in full:
        return full  # somebody's own backward pass
    name = full.split("Backward")[0].rpartition("::")[2]
    if name in _LINEAR:
        return ""
    edges = [n is not None and live.get(n, False) for n, _ in node.next_functions]
    if name == "Div":
        return "" if not any(edges[1:]) else full
    if name.startswith("ScaledDotProduct"):
        return "" if not any(edges[:2]) and not any(edges[3:]) else full
    if "grouped_mm" in full:
        return "" if sum(edges[:2]) < 2 else full
    factors: Any = _PRODUCTS.get(name)
    if factors is None:
        return full
    return "" if sum(edges[i] for i in factors if i < len(edges)) < 2 else full
