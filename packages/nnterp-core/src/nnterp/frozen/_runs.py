"""A forward pass on a short probe, with a note of where every part stands in autograd's graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import GradientEdge
from torch.utils.hooks import RemovableHandle

from nnterp.anatomy import Anatomy
from nnterp.discovery import probe_ids
from nnterp.frozen._audit import edge
from nnterp.frozen._holding import Holding
from nnterp.frozen._parts import FrozenParts
from nnterp.huggingface import input_embedding, uncached, with_logits
from nnterp.tensors import stream_in, stream_out

LENGTH = 8  # tokens of the probe
Ends = tuple[str, str]  # paths of a part's first and last module


@dataclass
class Call:
    """One call of a part: where its inputs and its output stand in the graph, and their numbers."""

    starts: list[GradientEdge] = field(default_factory=list)
    given: list[torch.Tensor] = field(default_factory=list)
    end: GradientEdge | None = None
    made: torch.Tensor | None = None


class Run:
    """A forward pass on the probe with some kinds held still.

    Args:
        module: The HuggingFace module.
        anatomy: Which module of it plays which part.
        parts: Where its attentions, norms and feed-forwards are.
        kinds: What is held still, some of `FROZEN`.

    Attributes:
        calls: Part → its calls.
        outputs: What each layer returned, and the logits.
        stream: Where the stream enters the first layer and leaves the last; fewer if they have no gradient.
    """

    def __init__(self, module: nn.Module, anatomy: Anatomy, parts: FrozenParts, kinds: tuple[str, ...]) -> None:
        self.calls: dict[Ends, list[Call]] = {}
        self.outputs: list[torch.Tensor] = []
        self.stream: list[GradientEdge] = []
        self._norms = {(path, path) for path in parts.norms}
        everything = dict.fromkeys((*parts.attentions, *parts.mlps, *sorted(self._norms)))
        get, handles = module.get_submodule, list[RemovableHandle]()
        embedding = input_embedding(module)
        if embedding is not None:
            handles.append(embedding.register_forward_hook(_begin_graph))
        try:
            for ends in everything:
                before = partial(self._before, ends)
                handles.append(get(ends[0]).register_forward_pre_hook(before, with_kwargs=True))
            with Holding(module, parts, kinds):  # its hooks change what modules return, so they come first
                for ends in everything:
                    handles.append(get(ends[1]).register_forward_hook(partial(self._after, ends)))
                for path in parts.layers:
                    handles.append(get(path).register_forward_pre_hook(self._layer_begins, with_kwargs=True))
                    handles.append(get(path).register_forward_hook(self._layer_ends))
                ids = probe_ids(module, anatomy.sizes.vocab_size, 1, LENGTH, seed=11)
                logits = with_logits(module(input_ids=ids, **uncached(module))).logits
        finally:
            for handle in handles:
                handle.remove()
        self.outputs.append(logits.detach())

    def _before(self, ends: Ends, _: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, Mapping] | None:
        """Note a part's inputs. All but the first are handed on as leaves of the graph.

        BLOOM's feed-forward is given the stream as well, which its first input is made of: what flows back to the
        stream through the first input must not be counted again.
        """
        stream = stream_in(args, kwargs)
        if stream is None or not torch.is_grad_enabled():  # an index, chosen without gradients
            return None
        call = Call()
        self.calls.setdefault(ends, []).append(call)
        if stream.requires_grad:
            call.starts, call.given = [edge(stream)], [stream.detach().clone()]

        def apart(x: Any) -> Any:
            first = x is stream
            if not isinstance(x, torch.Tensor) or not x.is_floating_point() or x.requires_grad is first:
                return x
            leaf, clone = _afresh(x)
            if first or ends not in self._norms:  # a norm's other input is a gate
                call.starts.append(edge(leaf))
                call.given.append(x.detach().clone())
            return clone

        return tuple(map(apart, args)), {name: apart(x) for name, x in kwargs.items()}

    def _after(self, ends: Ends, _: nn.Module, args: tuple, output: Any) -> None:
        stream = stream_out(output)
        if stream is not None and self.calls.get(ends) and stream.requires_grad:
            call = self.calls[ends][-1]
            call.end, call.made = edge(stream), stream.detach().clone()

    def _layer_begins(self, _: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        stream = stream_in(args, kwargs)
        if stream is not None and stream.requires_grad and not self.stream:
            self.stream.append(edge(stream))

    def _layer_ends(self, _: nn.Module, args: tuple, output: Any) -> None:
        stream = stream_out(output)
        if stream is None:
            return
        self.outputs.append(stream.detach().clone())
        if stream.requires_grad:
            self.stream[1:] = [edge(stream)]


def _begin_graph(_: nn.Module, args: tuple, output: Any) -> Any:
    """Begin the graph at the token embeddings: weights require no gradient."""
    return _afresh(output)[1] if isinstance(output, torch.Tensor) and output.is_floating_point() else None


def _afresh(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A leaf with the numbers of a tensor, and a copy of the leaf, which may be changed in place."""
    leaf = x.detach().requires_grad_(True)
    return leaf, leaf.clone()
