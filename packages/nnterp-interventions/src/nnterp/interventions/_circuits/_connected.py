"""Which edges are on a path from the embeddings to the logits, and random circuits that have such edges alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nnterp.interventions._circuits._graph import Input, Node


def connected(writers: Sequence[Node], inputs: Sequence[Input], kept: torch.Tensor) -> torch.Tensor:
    """Those of some edges that are on a path from the embeddings to the logits along these edges.

    Args:
        writers: All nodes that write, in forward order.
        inputs: All that reads, in forward order.
        kept: The edges, bool `[inputs, writers]`.

    Returns:
        Bool `[inputs, writers]`.
    """
    paths = _Paths(writers, inputs)
    starts = torch.tensor([node.role == "embeddings" for node in writers])
    for w in range(len(writers)):
        if not starts[w] and paths.own[w]:
            starts[w] = bool((kept[paths.own[w]] & starts).any())
    ends = torch.tensor([own.role == "logits" for own in inputs])
    for i in reversed(range(len(inputs))):
        if not ends[i]:
            ends[i] = bool((kept[:, paths.made[i]] & ends[:, None]).any())
    return kept & starts & ends[:, None]


def random_circuit(
    writers: Sequence[Node], inputs: Sequence[Input], possible: torch.Tensor, size: int, seed: int
) -> torch.Tensor:
    """Random edges, all on paths from the embeddings to the logits along these edges.

    Edges are drawn one after another, each with an edge that leads to it from what the circuit holds already and one
    that leads on from it, where it needs them.

    Args:
        writers, inputs: As in `connected`.
        possible: The edges that the model has, bool `[inputs, writers]`.
        size: How many.
        seed: Of the random numbers.

    Returns:
        Bool `[inputs, writers]`, with `size` edges.
    """
    return _Growing(writers, inputs, possible, seed).grown(size)


class _Paths:
    """How inputs and writers follow each other inside nodes.

    Attributes:
        own: For each writer, the inputs of its node; those of all heads for a bias.
        made: For each input, the writers that it is an input of.
    """

    def __init__(self, writers: Sequence[Node], inputs: Sequence[Input]) -> None:
        index = {node: w for w, node in enumerate(writers)}
        self.own: list[list[int]] = [[] for _ in writers]
        self.made: list[list[int]] = [[] for _ in inputs]
        for i, one in enumerate(inputs):
            bias = [Node("bias", one.layer)] if one.nodes and one.nodes[0].role == "head" else []
            for node in (*one.nodes, *bias):
                if node in index:
                    self.own[index[node]].append(i)
                    self.made[i].append(index[node])


class _Growing:
    """A random circuit that grows edge by edge.

    Attributes:
        kept: The edges of the circuit; `flags` is the same memory, of which single entries are read faster.
        starts: For each writer, whether the embeddings reach it.
        ends: For each input, whether it reaches the logits.
        done: The writers and the inputs at which an edge of the circuit ends.
    """

    def __init__(self, writers: Sequence[Node], inputs: Sequence[Input], possible: torch.Tensor, seed: int) -> None:
        self.paths, self.possible = _Paths(writers, inputs), possible
        self.random = torch.Generator().manual_seed(seed)
        self.kept = torch.zeros_like(possible)
        self.flags = self.kept.numpy()
        self.starts = [node.role == "embeddings" for node in writers]
        self.ends = [one.role == "logits" for one in inputs]
        self.done: tuple[set[int], set[int]] = set(), set()
        self.left = 0

    def grown(self, size: int) -> torch.Tensor:
        """Add edges until there are `size`."""
        self.left = min(size, int(self.possible.sum()))
        while self.left:
            before = self.left
            receivers, senders = (self.possible & ~self.kept).nonzero(as_tuple=True)
            order = torch.randperm(len(senders), generator=self.random)
            for receiver, sender in zip(receivers[order].tolist(), senders[order].tolist(), strict=True):
                if not self.left:
                    break
                self.add(receiver, sender)
            assert self.left < before, "an edge from the embeddings to the logits is left, or one between what is there"
        return self.kept

    def add(self, receiver: int, sender: int) -> None:
        """Add an edge with those that it needs, unless they are too many."""
        if self.flags[receiver, sender]:
            return
        begun, goes_on = self.starts[sender], self.ends[receiver]
        if 1 + (not begun) + (not goes_on) > self.left:
            return
        own, made = self.paths.own[sender], self.paths.made[receiver]
        first = last = None
        if not begun:
            first = self.drawn(self.possible[own] & torch.tensor(self.starts))
        if not goes_on:
            last = self.drawn(self.possible[:, made] & torch.tensor(self.ends)[:, None])
        if (first is None and not begun) or (last is None and not goes_on):
            return
        needed = [(receiver, sender)]
        if first is not None:
            needed.append((own[first[0]], first[1]))
        if last is not None:
            needed.append((last[0], made[last[1]]))
        new = [edge for edge in needed if not self.flags[edge]]
        if len(new) > self.left:
            return
        self.left -= len(new)
        for edge in new:
            self.flags[edge] = True
        for i, w in needed:
            self.link(i, w)

    def link(self, receiver: int, sender: int) -> None:
        """Note what an edge of the circuit connects: the embeddings with what it leads to, the logits with the rest."""
        writers, inputs = self.done
        if sender not in writers:
            writers.add(sender)
            for i in self.paths.own[sender]:
                self.ends[i] = True
        if receiver not in inputs:
            inputs.add(receiver)
            for w in self.paths.made[receiver]:
                self.starts[w] = True
        self.ends[receiver] = self.starts[sender] = True

    def drawn(self, there: torch.Tensor) -> tuple[int, int] | None:
        """A random entry of those that are there."""
        rows, columns = there.nonzero(as_tuple=True)
        if not len(rows):
            return None
        k = int(torch.randint(len(rows), (1,), generator=self.random))
        return int(rows[k]), int(columns[k])
