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
        against_last: How each layer's distribution compares with that of the last layer read; see `compare`.
    """

    def __init__(
        self,
        probs: bool = False,
        inverse: bool = False,
        top_k: int | None = None,
        targets: torch.Tensor | None = None,
        ranks: bool = False,
        entropy: bool = False,
        against_last: bool = False,
    ) -> None:
        self.probs, self.inverse, self.top_k = probs, inverse, top_k
        self.targets, self.ranks, self.entropy = targets, ranks, entropy
        self.against_last = against_last

    def __call__(self, logits: torch.Tensor, prompts: torch.Tensor, layers: int = 1) -> dict[str, torch.Tensor]:
        """Reduce float32 logits `[n, vocab]` of the prompts with indices `prompts`, `[n]`; returns `[n, ...]` each.

        `layers` rows after each other are one position, read at each layer; with `against_last` none is cut in two.
        """
        found: dict[str, torch.Tensor] = {}
        if self.probs:
            found["probs"] = logits.softmax(-1)
        if self.top_k is None and self.targets is None and not self.entropy and not self.against_last:
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
        if self.against_last:
            found |= {name: tensor.flatten() for name, tensor in compare(logs.unflatten(0, (-1, layers))).items()}
        return found


def compare(logs: torch.Tensor) -> dict[str, torch.Tensor]:
    """How log-probabilities `[n, layers, vocab]` compare with those of the last layer; `[n, layers]` each.

    Returns:
        `last_ranks`: how many tokens are more probable than the one that is on top in the last layer. `kl`: the
        Kullback-Leibler divergence of the layer's distribution from the last layer's, KL(last ‖ layer), in nats
        (Belrose et al. 2023, section 3.1).
    """
    last = logs[:, -1:]
    own = logs.gather(-1, last.argmax(-1, keepdim=True).expand(-1, logs.shape[1], -1))
    share = last.exp()
    apart = torch.where(share > 0, share * (last - logs), torch.zeros((), dtype=logs.dtype, device=logs.device))
    return {"last_ranks": (logs > own).sum(-1), "kl": apart.sum(-1).clamp(min=0.0)}
