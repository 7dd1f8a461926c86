"""Which directions of the stream after the last layer raise the logits of tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer

_STATES = 256  # orthogonal states over which gradients are averaged
_AT_ONCE = 32


def readout_directions(model: StandardizedTransformer, tokens: list[int]) -> torch.Tensor:
    """Gradients of tokens' logits by the stream after the last layer, `[tokens, hidden]`, float32 on the CPU.

    They are averaged over orthogonal states of unit root mean square, so that what a norm's denominator takes away
    along the state itself is spread evenly.
    """
    model.require_no_trace("from_vocab()")
    model.prepare()
    width = model.hidden_size or model.readout.layout.width
    assert width
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(width, min(width, _STATES), generator=generator))[0].T * width**0.5
    found = torch.zeros(len(tokens), width)
    with torch.inference_mode(False), torch.enable_grad():
        for start in range(0, len(basis), _AT_ONCE):
            states = basis[start : start + _AT_ONCE].to(model._module.dtype).requires_grad_(True)
            logits = model.project_on_vocab(states)
            for row, token in enumerate(tokens):
                grads = torch.autograd.grad(logits[:, token].sum(), states, retain_graph=row < len(tokens) - 1)
                found[row] += grads[0].float().cpu().sum(0)
    return found / len(basis)
