"""Prove attention probabilities by what they do."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from nnterp.errors import Unavailable

if TYPE_CHECKING:
    from nnterp.standardized_transformer import StandardizedTransformer

LENGTH = 10


def check_probabilities(model: StandardizedTransformer, layer: int, heads: int | None) -> str | None:
    """What is wrong with the attention probabilities of one layer; None if nothing is."""
    vocab = model.vocab_size or 100
    ids = torch.randint(min(8, vocab - 1), min(vocab, 4096), (2, LENGTH), generator=torch.Generator().manual_seed(7))
    with torch.no_grad(), model.trace(ids):
        probs = model.attention_probabilities[layer].clone().save()
        clean = model.logits.save()
    queries = probs.shape[-2] if probs.dim() == 4 else 0
    if probs.dim() != 4 or probs.shape[0] != 2 or (heads is not None and probs.shape[1] != heads) or queries < LENGTH:
        return f"their shape is {list(probs.shape)}, not [2, {heads}, {LENGTH}, keys]"
    sums = probs.double().sum(-1)
    if not bool(torch.isfinite(probs).all()) or bool((sums > 1 + 1e-2).any()) or bool((probs < 0).any()):
        return f"rows sum to up to {sums.max().item():.3f}"
    try:
        with torch.no_grad(), model.trace(ids):
            model.attention_probabilities[layer] = torch.zeros_like(probs)
            heads_out = model.attention_head_outputs[layer].save()
            changed = model.logits.save()
    except Unavailable:
        heads_out = None
        with torch.no_grad(), model.trace(ids):
            model.attention_probabilities[layer] = torch.zeros_like(probs)
            changed = model.logits.save()
    if heads_out is not None and heads_out.abs().max() > 1e-5:
        return "zeros written to them leave something of the heads' outputs, so the values are not weighted with them"
    if torch.equal(changed, clean):
        return "writing them does not change the logits"
    return None
