"""What is compared, and on which prompts. Imported in every environment: nothing but the standard library and torch."""

from __future__ import annotations

import torch

CELLS = {
    "stream": "the residual stream after each layer",
    "readout": "logits read out of the last stream: final norm, head, softcap, scale",
    "padded": "a left-padded batch of two: streams and logits equal those of the two prompts alone",
    "pattern": "attention probabilities of each layer with softmax attention",
    "attention": "the output of each attention",
    "mlp": "the output of each feed-forward",
    "write": "logits after a vector is added to the stream after layer 1",
    "head": "logits after the output of one attention head is set to zero",
}
TOLERANCE = 1e-4
LONG, SHORT = 12, 7
FIRST_ORDINARY_TOKEN = 8
HEAD = 1


def prompts(vocabulary: int) -> list[list[int]]:
    """Two prompts of ordinary tokens, of different lengths."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(FIRST_ORDINARY_TOKEN, vocabulary, (n,), generator=generator).tolist() for n in (LONG, SHORT)]


def left_padded(rows: list[list[int]], padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask of a left-padded batch, both `[batch, seq]`."""
    longest = max(map(len, rows))
    ids = torch.tensor([[padding] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def own_tokens(batch: torch.Tensor, rows: list[list[int]]) -> torch.Tensor:
    """What belongs to the tokens of the rows in the value of a left-padded batch, row after row along the sequence.

    The batch's axis stands before that of the sequence, or after it where an engine keeps the layout of the model. A
    tensor without the two axes comes back as it is.
    """
    longest = max(map(len, rows))
    for axis in range(batch.ndim - 1):
        if batch.shape[axis : axis + 2] == (longest, len(rows)) and longest != len(rows):
            batch = batch.transpose(axis, axis + 1)
        if batch.shape[axis : axis + 2] == (len(rows), longest):
            cut = [
                one.narrow(axis, longest - len(row), len(row))
                for one, row in zip(batch.unbind(axis), rows, strict=True)
            ]
            return torch.cat(cut, dim=axis)
    return batch


def vector(size: int, scale: float) -> torch.Tensor:
    """What is added to the stream, `[size]`."""
    return torch.randn(size, generator=torch.Generator().manual_seed(6)) * scale
