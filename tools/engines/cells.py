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


def vector(size: int, scale: float) -> torch.Tensor:
    """What is added to the stream, `[size]`."""
    return torch.randn(size, generator=torch.Generator().manual_seed(6)) * scale
