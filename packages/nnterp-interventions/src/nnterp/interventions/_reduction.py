"""Reducing logits inside the model to what is asked for: probabilities, top tokens, targets, ranks, entropy."""

from __future__ import annotations

import torch

from nnterp.record import Record


class Reduction(Record):
    """What is kept of logits: a function from logits to named tensors.

    Attributes:
        probs: The probabilities of the whole vocabulary.
        inverse: The caller also reduces the inverse logits; see `inverse_logits`.
        top_k: The probabilities and ids of the most probable tokens.
        targets: The summed probability of each target: token ids `[prompts, targets, members]`, -1 for none.
        ranks: How many tokens are more probable than each target's most probable member.
        entropy: The entropy of the next-token distribution, in nats.
    """

    def __init__(
        self,
        probs: bool = False,
        inverse: bool = False,
        top_k: int | None = None,
        targets: torch.Tensor | None = None,
        ranks: bool = False,
        entropy: bool = False,
    ) -> None:
        self.probs, self.inverse, self.top_k = probs, inverse, top_k
        self.targets, self.ranks, self.entropy = targets, ranks, entropy

    def __call__(self, logits: torch.Tensor, prompts: torch.Tensor) -> dict[str, torch.Tensor]:
        """Reduce float32 logits `[n, vocab]` of the prompts with indices `prompts`, `[n]`; returns `[n, ...]` each."""
        found: dict[str, torch.Tensor] = {}
        if self.probs:
            found["probs"] = logits.softmax(-1)
        if self.top_k is None and self.targets is None and not self.entropy:
            return found
        logs = logits.log_softmax(-1)
        if self.top_k is not None:
            top, found["top_ids"] = logs.topk(self.top_k, dim=-1)
            found["top_probs"] = top.exp()
        if self.targets is not None:
            ids = self.targets.to(logits.device)[prompts.to(logits.device)]
            own = logs.gather(-1, ids.clamp(min=0).flatten(1)).view(ids.shape).masked_fill(ids < 0, -torch.inf)
            absent = (ids < 0).all(-1)
            found["target_probs"] = own.exp().sum(-1).masked_fill(absent, float("nan"))
            if self.ranks:
                best = own.amax(-1)
                ranks = [(logs > best[:, k : k + 1]).sum(-1) for k in range(best.shape[1])]
                found["target_ranks"] = torch.stack(ranks, dim=-1).masked_fill(absent, -1)
        if self.entropy:
            found["entropy"] = -(logs.exp() * logs.clamp(min=torch.finfo(logs.dtype).min)).sum(-1)
        return found
