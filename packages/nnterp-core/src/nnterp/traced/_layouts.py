"""How a model stores a tensor, and how the value is shown.

The stream is nearly always `[batch, seq, hidden]`. Models with several streams have one more axis: Gemma 3n stacks
the streams in front (`[streams, batch, seq, hidden]`), DeepSeek-V4 behind (`[batch, seq, streams, hidden]`). XLNet
stores its stream as `[seq, batch, hidden]`; nnterp shows it batch first, like every other. ProphetNet stores a main
stream and its predicting streams one after the other on the sequence axis; nnterp shows them as it shows
DeepSeek-V4's. A stream longer than the input is taken for several streams if its length is a multiple of the input's,
else for a soft prompt and the stream; the certificate tests that guess against HuggingFace's hidden states and
logits.
"""

from __future__ import annotations

import torch

from nnterp.record import Record

# Positions that the model itself puts in front of the tokens are not shown.
PROMPTED = "[batch, soft prompt + seq, ...]"
PROMPTED_QUERIES = "[batch, heads, soft prompt + query, key]"
PARTS = "[batch, parts × heads, seq, dim]"  # a head's vector cut in pieces: first every head's first piece, ...


class Layout(Record):
    """How a model stores a tensor that nnterp shows with batch first, then positions, then heads.

    Attributes:
        name: Its axes.
        heads: How many heads (or parts of a head, or streams, or positions of a soft prompt) share an axis with
            something else.
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
        if self.name in (PROMPTED, PROMPTED_QUERIES):
            axis = 1 if self.name == PROMPTED else 2
            front = self.heads if x.shape[axis] > self.heads else 0  # a step with a cache runs no soft prompt
            return x.narrow(axis, front, x.shape[axis] - front)
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
        if self.name in (PROMPTED, PROMPTED_QUERIES):
            axis = 1 if self.name == PROMPTED else 2
            return torch.cat([was.narrow(axis, 0, was.shape[axis] - value.shape[axis]), value], axis)
        return value


class StreamLayout(Record):
    """Where batch and sequence stand in the tensors that layers return.

    Attributes:
        dims: Number of axes.
        batch: Index of the batch axis, as shown; the sequence axis follows it.
        width: Size of the last axis.
        extra: Number of positions that the model itself puts in front of the tokens (CPM-Ant's soft prompt).
        sequence_first: Whether the model stores the stream as `[seq, batch, hidden]`.
        streams: How many streams the model stores one after the other, `[batch, streams × seq, hidden]`.
    """

    def __init__(
        self, dims: int, batch: int, width: int, extra: int = 0, sequence_first: bool = False, streams: int = 1
    ) -> None:
        self.dims, self.batch, self.width, self.extra = dims, batch, width, extra
        self.sequence_first, self.streams = sequence_first, streams

    @classmethod
    def of(cls, shape: torch.Size, batch: int, seq: int) -> StreamLayout | None:
        """The layout of a stream recorded for an input of `[batch, seq]`; None if no axes are those of the input."""
        for axis in range(len(shape) - 2):
            if tuple(shape[axis : axis + 2]) == (batch, seq):
                return cls(len(shape), axis, shape[-1])
        if len(shape) == 3 and tuple(shape[:2]) == (seq, batch):
            return cls(3, 0, shape[-1], sequence_first=True)
        if len(shape) != 3 or shape[0] != batch or shape[1] < seq:
            return None
        if shape[1] % seq == 0:
            return cls(4, 0, shape[-1], streams=shape[1] // seq)
        return cls(3, 0, shape[-1], extra=shape[1] - seq)

    @property
    def plain(self) -> bool:
        """Whether it is shown as `[batch, seq, hidden]`."""
        return self.dims == 3 and self.batch == 0

    @property
    def stored(self) -> Layout | None:
        """How the model stores the stream; None if it stores it as it is shown."""
        if self.sequence_first:
            return Layout("[seq, batch, hidden]")
        return Layout("[batch, streams × seq, hidden]", self.streams) if self.streams > 1 else None

    def shown(self, stream: torch.Tensor) -> torch.Tensor:
        """A stream as it is shown, from how the model stores it; a view."""
        return stream if self.stored is None else self.stored.show(stream)

    def native(self, stream: torch.Tensor) -> torch.Tensor:
        """A stream as the model stores it, from how it is shown."""
        return stream if self.stored is None else self.stored.back(stream, stream)

    def is_stored(self, shape: torch.Size, batch: int, seq: int) -> bool:
        """Whether a tensor of this shape, recorded for an input of `[batch, seq]`, is stored as the stream is."""
        if self.sequence_first:
            return tuple(shape[:2]) == (seq, batch)
        return self.streams > 1 and len(shape) == 3 and tuple(shape[:2]) == (batch, self.streams * seq)
