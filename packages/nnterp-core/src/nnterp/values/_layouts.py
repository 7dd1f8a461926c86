"""How models keep their tensors, and how they are shown."""

from __future__ import annotations

import torch

from nnterp.record import Record

PARTS = "[batch, parts × heads, seq, dim]"  # a head's vector in several pieces, all heads' first pieces first


class Layout(Record):
    """How a model keeps a tensor that nnterp shows with batch first, then positions, then heads.

    Attributes:
        name: Its axes.
        heads: How many heads (or parts of a head, or streams) share an axis with something else.
    """

    def __init__(self, name: str, heads: int = 0) -> None:
        self.name, self.heads = name, heads

    def show(self, x: torch.Tensor) -> torch.Tensor:
        """From the model's layout to the value's; a view of the same memory wherever torch can make one."""
        if self.name == "[batch, heads, seq, dim]":
            return x.transpose(1, 2)
        if self.name.startswith("[seq, batch"):
            return x.transpose(0, 1)
        if self.name == "[batch, streams × seq, hidden]":
            return x.unflatten(1, (self.heads, -1)).transpose(1, 2)
        if self.name == "[batch, heads, dim, seq]":
            return x.permute(0, 3, 1, 2)
        if self.name == "[batch × heads, seq, dim]":
            return x.view(-1, self.heads, *x.shape[1:]).transpose(1, 2)
        if self.name == "[batch × heads, dim, seq]":
            return x.view(-1, self.heads, *x.shape[1:]).permute(0, 3, 1, 2)
        if self.name == "[batch, seq, heads × dim]":
            return x.unflatten(-1, (self.heads, -1))
        if self.name == "[batch, seq, groups, ...]":
            return x.flatten(2).unflatten(-1, (self.heads, -1))
        if self.name == "[batch × heads, query, key]":
            return x.view(-1, self.heads, *x.shape[1:])
        if self.name == PARTS:
            return x.unflatten(1, (self.heads, -1)).permute(0, 3, 2, 1, 4).flatten(3)
        return x

    def back(self, value: torch.Tensor, was: torch.Tensor) -> torch.Tensor:
        """From the value's layout to the model's, given the tensor that is replaced."""
        if self.name == "[batch, heads, seq, dim]":
            return value.transpose(1, 2)
        if self.name.startswith("[seq, batch"):
            return value.transpose(0, 1)
        if self.name == "[batch, streams × seq, hidden]":
            return value.transpose(1, 2).flatten(1, 2)
        if self.name == "[batch, heads, dim, seq]":
            return value.permute(0, 2, 3, 1)
        if self.name == "[batch × heads, seq, dim]":
            return value.transpose(1, 2).reshape(was.shape)
        if self.name == "[batch × heads, dim, seq]":
            return value.permute(0, 2, 3, 1).reshape(was.shape)
        if self.name in ("[batch, seq, heads × dim]", "[batch, seq, groups, ...]", "[batch × heads, query, key]"):
            return value.reshape(was.shape)
        if self.name == PARTS:
            return value.unflatten(3, (self.heads, -1)).permute(0, 3, 2, 1, 4).reshape(was.shape)
        return value
