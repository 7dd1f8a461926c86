"""A model as a graph: the nodes that write into the residual stream, and the inputs of nodes that read it.

Writers stand in forward order, and each input reads all writers before it: its possible edges come from a prefix of
them (Elhage et al., "A Mathematical Framework for Transformer Circuits", 2021; Syed et al., "Attribution patching
outperforms automated circuit discovery", 2023).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

import torch

from nnterp.errors import Unavailable
from nnterp.interventions._attribution import shares_of, terms_of
from nnterp.interventions._layers import require_once
from nnterp.interventions._units import units_of
from nnterp.traced import ReadOnly

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer

NodeRole: TypeAlias = Literal["embeddings", "head", "bias", "mixer", "mlp", "logits"]
InputRole: TypeAlias = Literal["query", "key", "value", "mixer", "mlp", "logits"]
HEAD_INPUTS: dict[InputRole, str] = {
    "query": "attention_queries",
    "key": "attention_keys",
    "value": "attention_values",
}
_NEEDED = (*HEAD_INPUTS.values(), "attention_head_outputs", "attention_head_contributions", "attention_contributions")


@dataclass(frozen=True, order=True)
class Node:
    """A node of the graph.

    Attributes:
        role: "embeddings" (the stream entering the first layer), "head", "bias" (what a post-norm makes of the bias of
            an attention, which varies with the norm's scale), "mixer" (a mixer without heads, or two side by side),
            "mlp" (a mixture of experts is one node) or "logits" (the stream after the last layer).
        layer: Its layer; the first for "embeddings", the last for "logits".
        head: Of a head, its index.
    """

    role: NodeRole
    layer: int
    head: int | None = None

    def __str__(self) -> str:
        if self.role in ("embeddings", "logits"):
            return self.role
        return f"L{self.layer} H{self.head}" if self.role == "head" else f"L{self.layer} {self.role}"


@dataclass(frozen=True)
class Input:
    """Something that reads the stream: one of a head's three inputs, or what another node is given.

    Attributes:
        role: "query", "key", "value", "mixer", "mlp" or "logits".
        layer: Its layer.
        head: Of a query its head; of a key or value its key-value head, which several heads share under grouped
            queries.
        nodes: The nodes that it is an input of: more than one under grouped queries.
    """

    role: InputRole
    layer: int
    head: int | None
    nodes: tuple[Node, ...]

    def __str__(self) -> str:
        if self.role not in HEAD_INPUTS:
            return str(self.nodes[0])
        shared = len(self.nodes) > 1 or self.nodes[0].head != self.head
        if not shared:
            return f"{self.nodes[0]} {self.role}"
        return f"L{self.layer} KV{self.head} {self.role} (heads {', '.join(str(node.head) for node in self.nodes)})"


@dataclass(frozen=True)
class Block:
    """What one layer has.

    Attributes:
        layer: The layer.
        heads, keys, values: How many query heads, and heads of keys and of values; 0 where the mixer is one node.
        bias: Whether the bias of attention is a node of its own.
        mixer: Whether a mixer is one node.
        mlp: "mid" if the MLP reads the stream after attention, "input" if it reads what the layer is given, "" if
            there is none.
    """

    layer: int
    heads: int = 0
    keys: int = 0
    values: int = 0
    bias: bool = False
    mixer: bool = False
    mlp: Literal["mid", "input", ""] = ""


class Columns(NamedTuple):
    """The columns of what a projection returns that make one input of the graph."""

    path: str
    columns: tuple[int, ...]


@dataclass(frozen=True)
class Graph:
    """All writers and inputs of a model.

    Attributes:
        blocks: Its layers that run on texts.
        writers: The nodes that write, in forward order.
        inputs: What reads, in forward order.
        before: For each input, how many of the first writers it reads.
        columns: For the queries, keys and values of some layers, the columns of a projection that make them.
    """

    blocks: tuple[Block, ...]
    writers: tuple[Node, ...]
    inputs: tuple[Input, ...]
    before: tuple[int, ...]
    columns: Mapping[int, Columns] = field(default_factory=dict)

    @cached_property
    def possible(self) -> torch.Tensor:
        """Which edges there are, bool `[inputs, writers]`."""
        return torch.arange(len(self.writers)) < torch.tensor(self.before)[:, None]

    @cached_property
    def reading_alike(self) -> list[slice]:
        """Neighbouring inputs that read the same stream."""
        found, start = [], 0
        streams = [(own.layer, before) for own, before in zip(self.inputs, self.before, strict=True)]
        streams.append((-1, -1))
        for stop in range(1, len(streams)):
            if streams[stop] != streams[start]:
                found.append(slice(start, stop))
                start = stop
        return found

    @cached_property
    def projections(self) -> tuple[str, ...]:
        """Paths of the projections whose columns are known."""
        return tuple(dict.fromkeys(own.path for own in self.columns.values()))

    @cached_property
    def writer_index(self) -> dict[Node, int]:
        """Node → its index among the writers."""
        return {node: i for i, node in enumerate(self.writers)}

    @cached_property
    def inputs_of(self) -> dict[tuple[int, str], list[int]]:
        """(layer, role) → indices of the inputs, by head."""
        found: dict[tuple[int, str], list[int]] = {}
        for i, own in enumerate(self.inputs):
            found.setdefault((own.layer, own.role), []).append(i)
        return found

    @cached_property
    def writers_of(self) -> dict[tuple[int, str], list[int]]:
        """(layer, role) → indices of the writers, by head."""
        found: dict[tuple[int, str], list[int]] = {}
        for i, node in enumerate(self.writers):
            found.setdefault((node.layer, node.role), []).append(i)
        return found


Feeds: TypeAlias = dict[tuple[int, str], torch.Tensor]  # (layer, role of an input) → bool [heads, heads of the input]


def blocks_of(model: StandardizedTransformer, what: str) -> tuple[Block, ...]:
    """What each layer has.

    Args:
        model: The model; its weights are here.
        what: The function that needs it, for errors.

    Raises:
        Unavailable: The stream is no sum of what the parts add, something beside mixers and MLPs reads or writes it, a
            layer borrows keys and values, or the inside of its attention is not served; says why.
    """
    name = model.model_class
    require_once(model, what)
    if model.anatomy.between:
        raise Unavailable(
            f"{what} is not served for {name}: {model.anatomy.between[0]} adds to the stream between its layers."
        )
    for lender, _, lent in model.lenders:
        raise Unavailable(
            f"{what} is not served for {name}: layer {lender} lends {lent} to later layers, "
            "so what a head reads is not the stream of its own layer alone."
        )
    found, terms = [], terms_of(model, what)
    for layer in dict.fromkeys(term.layer for term in terms):
        structure = model.facts.residual_of(layer)
        roles: set[str] = {term.role for term in terms if term.layer == layer and term.role != "embeddings"}
        scale = structure.stream_scale
        scaled = bool((scale != 1).any()) if isinstance(scale, torch.Tensor) else abs(scale - 1) > 1e-4
        if structure.kind == "silent" or "other" in roles or scaled:
            why = (
                structure.reason or "further modules than its mixer and its feed-forward read the stream and add to it"
            )
            why = "it multiplies the stream" if scaled else why
            raise Unavailable(f"{what} is not served for {name}: layer {layer}: {why}.")
        found.append(_block(model, layer, roles, structure.kind, what))
    return tuple(found)


def _block(model: StandardizedTransformer, layer: int, roles: set[str], kind: str, what: str) -> Block:
    mlp: Literal["mid", "input", ""] = ""
    if "mlp" in roles:
        mlp = "mid" if kind == "sequential" else "input"
    if mlp == "mid" and isinstance(place := model.place("layers_mid", layer), ReadOnly):
        raise Unavailable(f"{what} is not served for {model.model_class}: layers_mid[{layer}]: {place.reason}.")
    if roles.isdisjoint({"attention", "mixer"}):
        return Block(layer, mlp=mlp)
    if roles & {"attention", "mixer"} != {"attention"}:
        return Block(layer, mixer=True, mlp=mlp)
    for value in _NEEDED:
        model.place(value, layer)
    shares_of(model, "attention", layer)
    heads, keys, values = (
        len(units_of(model, [value], "all", [layer]))
        for value in ("attention_head_outputs", "attention_keys", "attention_values")
    )
    return Block(layer, heads, keys, values, False, False, mlp)


def graph_from(model: StandardizedTransformer, blocks: tuple[Block, ...], feeds: Feeds) -> Graph:
    """The graph of a model.

    Args:
        model: The model.
        blocks: What each layer has.
        feeds: For each layer and each of "query", "key" and "value": which heads of it reach which head's output.
    """
    writers, inputs, before = [Node("embeddings", blocks[0].layer)], list[Input](), list[int]()

    def reading(role: InputRole, layer: int, head: int | None, nodes: tuple[Node, ...]) -> None:
        inputs.append(Input(role, layer, head, nodes))
        before.append(len(writers))

    for block in blocks:
        layer, mlp = block.layer, (Node("mlp", block.layer),)
        for role in HEAD_INPUTS:
            reached = feeds.get((layer, role), torch.zeros(0, 0))
            for head in range(reached.shape[1]):
                own = tuple(Node("head", layer, h) for h in range(block.heads) if reached[h, head])
                reading(role, layer, head, own)
        if block.mixer:
            reading("mixer", layer, None, (Node("mixer", layer),))
        if block.mlp == "input":
            reading("mlp", layer, None, mlp)
        writers += [Node("head", layer, head) for head in range(block.heads)]
        writers += [Node("bias", layer)] * block.bias + [Node("mixer", layer)] * block.mixer
        if block.mlp == "mid":
            reading("mlp", layer, None, mlp)
        writers += mlp if block.mlp else ()
    last = blocks[-1].layer
    reading("logits", last, None, (Node("logits", last),))
    return Graph(blocks, tuple(writers), tuple(inputs), tuple(before))
