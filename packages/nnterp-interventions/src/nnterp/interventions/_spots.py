"""Where the hidden states of a batch are read: positions of rows, and the states that stand there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from nnterp.errors import ShapeError
from nnterp.inputs import Batch

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer


@dataclass(frozen=True)
class Spots:
    """Where the hidden states of a batch are read, one entry for each position of each prompt.

    Attributes:
        row: Row of the batch.
        seq: Position in the padded batch.
        prompt: Index of the prompt among all prompts.
        place: Index of the position among those read of this prompt.
    """

    row: torch.Tensor
    seq: torch.Tensor
    prompt: torch.Tensor
    place: torch.Tensor


def spots_of(batch: Batch, where: list[tuple[int, ...]]) -> Spots:
    own = [[batch.starts[row] + p for p in where[i]] for row, i in enumerate(batch.indices)]
    row = torch.tensor([row for row, positions in enumerate(own) for _ in positions], dtype=torch.long)
    seq = torch.tensor([p for positions in own for p in positions], dtype=torch.long)
    place = torch.tensor([k for positions in own for k in range(len(positions))], dtype=torch.long)
    return Spots(row, seq, torch.tensor(batch.indices)[row], place)


def states_at(
    model: StandardizedTransformer, stream: torch.Tensor, row: torch.Tensor, seq: torch.Tensor, shape: torch.Size
) -> torch.Tensor:
    """The hidden states of a residual stream at some positions: `[spots, hidden]`, or `[spots, streams, hidden]`.

    Raises:
        ShapeError: The stream does not have these batch and sequence axes.
    """
    axis = model.readout.layout.batch  # several streams may stand in front of the batch
    if stream.shape[axis : axis + 2] != shape:
        raise ShapeError(
            f"The residual stream of this model has shape {list(stream.shape)}, without the axes {list(shape)} of the "
            "batch and its tokens, so no position of it can be read out."
        )
    row, seq = row.to(stream.device), seq.to(stream.device)
    return stream[row, seq] if axis == 0 else stream.movedim(0, 2)[row, seq]
