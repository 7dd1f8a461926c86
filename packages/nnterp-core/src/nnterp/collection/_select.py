"""Pick positions of each row out of a batch's tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nnterp.inputs import Batch
from nnterp.record import Record


class Selection(Record):
    """Positions of the rows of one batch.

    Attributes:
        index: `[rows, positions]`, where they stand in the batch; a short row repeats its first.
        mask: `[rows, positions]`, False at the repeats.
        whole: Whether they are all of every row and nothing else is in the batch.
        single: Whether the axis of positions is dropped.
        shape: `(rows, seq)` of the batch.
        starts, lengths: Where each row's first token stands, and how many it has.
        front: How many keys of attention stand before the tokens' (CPM-Ant's soft prompt).
        heard: For each row how many positions the encoder reads, which are the keys of cross-attention.
    """

    def __init__(
        self,
        index: torch.Tensor,
        mask: torch.Tensor,
        whole: bool,
        single: bool,
        shape: tuple[int, ...],
        starts: torch.Tensor,
        lengths: torch.Tensor,
        front: int = 0,
        heard: tuple[int, ...] = (),
    ) -> None:
        self.index, self.mask, self.whole, self.single = index, mask, whole, single
        self.shape, self.starts, self.lengths, self.front = shape, starts, lengths, front
        self.heard = heard


def last_of(batch: Batch) -> Selection:
    """The last token of each row, without an axis of positions."""
    rows, shape = len(batch), (len(batch), batch.input_ids.shape[1])
    mask, lengths = torch.ones(rows, 1, dtype=torch.bool), torch.tensor([len(row) for row in batch.rows])
    return Selection(batch.last[:, None], mask, False, True, shape, torch.tensor(batch.starts), lengths)


def pick(
    batch: Batch, chosen: Sequence[Sequence[int]], single: bool, front: int = 0, encoder: Batch | None = None
) -> Selection:
    """Find where the positions of a batch's rows stand.

    Args:
        batch: The rows.
        chosen: For each prompt that was given, its positions; a row's are found by the batch's `indices`.
        single: Whether the axis of positions is dropped.
        front: How many keys of attention stand before the tokens' (CPM-Ant's soft prompt).
        encoder: What the encoder reads.

    Returns:
        The selection, with its tensors on the CPU.
    """
    own = [chosen[i] for i in batch.indices]
    width = max(len(c) for c in own)
    index = torch.tensor(
        [[s + p for p in c] + [s + c[0]] * (width - len(c)) for s, c in zip(batch.starts, own, strict=True)]
    )
    mask = torch.tensor([[True] * len(c) + [False] * (width - len(c)) for c in own])
    rows, seq = batch.input_ids.shape
    everything = seq == width and bool(mask.all()) and bool((index == torch.arange(width)).all())
    lengths = torch.tensor([len(row) for row in batch.rows])
    heard = () if encoder is None else tuple(len(row) for row in encoder.rows)
    return Selection(index, mask, everything, single, (rows, seq), torch.tensor(batch.starts), lengths, front, heard)


def select(tensor: torch.Tensor, picked: Selection, label: str, shape: str) -> torch.Tensor:
    """The positions of each row, `[rows, positions, ...]` (or without the axis); a copy, zero where a row has none.

    Raises:
        ValueError: The tensor does not have one entry per row and position.
    """
    rows, seq = picked.shape
    if shape.endswith("query, key]"):
        return _pattern(tensor, picked, label, "cross_attention" in label)
    if tensor.dim() == shape.count(",") and tensor.shape[0] == rows * seq:  # batch and positions in one axis
        tensor = tensor.view(rows, seq, *tensor.shape[1:])
    if tensor.shape[0] != rows or tensor.dim() < 2 or tensor.shape[1] != seq:
        raise ValueError(
            f"{label} has shape {list(tensor.shape)} in a batch of {rows} rows of {seq} tokens, so it has no entry per "
            f"position; read it in a trace instead."
        )
    if picked.whole:
        return tensor[:, 0].clone() if picked.single else tensor.clone()
    index = picked.index.to(tensor.device)
    row = torch.arange(rows, device=tensor.device)
    if picked.single:
        return tensor[row, index[:, 0]]
    taken = tensor[row[:, None], index]
    return _zeroed(taken, picked.mask, 1)


def _pattern(tensor: torch.Tensor, picked: Selection, label: str, cross: bool = False) -> torch.Tensor:
    """`[rows, heads, query, key]` → the queries picked, the keys counted over the row's own tokens."""
    rows, seq = picked.shape
    tensor = tensor[..., picked.front :]
    lengths = torch.tensor(picked.heard) if cross else picked.lengths
    starts = torch.zeros_like(lengths) if cross else picked.starts
    across = int(lengths.max()) if cross else seq
    if tensor.dim() != 4 or tensor.shape[0] != rows or tensor.shape[2] != seq or tensor.shape[3] != across:
        raise ValueError(
            f"{label} has shape {list(tensor.shape)} in a batch of {rows} rows of {seq} tokens: its queries or keys "
            f"are not the prompt's tokens. Read it in a trace instead."
        )
    device = tensor.device
    row = torch.arange(rows, device=device)
    taken = tensor[row[:, None], :, picked.index.to(device)].transpose(1, 2)  # [rows, heads, positions, keys]
    width = int(lengths.max())
    keys = (starts[:, None] + torch.arange(width)[None]).clamp(max=across - 1).to(device)
    taken = taken.gather(3, keys[:, None, None, :].expand(*taken.shape[:3], width))
    real = (torch.arange(width)[None] < lengths[:, None]).to(device)
    taken = taken.masked_fill(~real[:, None, None, :], 0)
    taken = _zeroed(taken, picked.mask, 2)
    return taken[:, :, 0] if picked.single else taken


def _zeroed(tensor: torch.Tensor, mask: torch.Tensor, axis: int) -> torch.Tensor:
    if bool(mask.all()):
        return tensor
    shape = [mask.shape[0], *([1] * (tensor.dim() - 1))]
    shape[axis] = mask.shape[1]
    return tensor.masked_fill(~mask.to(tensor.device).view(shape), 0)
