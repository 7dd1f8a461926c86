"""The direction of the stream after the last layer whose product with the stream is the logit, but for biases.

With the scale of the final norm held still at its value in the run, the logit of a token (before a softcap) is affine
in the stream: `logit = direction · stream + bias`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from nnterp.devices import device_of
from nnterp.errors import Unavailable
from nnterp.interventions._attribution._held import held_norms, leaf
from nnterp.interventions._attribution._terms import accumulated, tolerance
from nnterp.interventions._tokens import ids_per_prompt
from nnterp.traced import Chain, Readout

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer


@dataclass(frozen=True)
class Targets:
    """The tokens whose logits are attributed, and what each logit counts.

    Attributes:
        ids: `[prompts, tokens]`, int64; 0 where a prompt has fewer.
        weights: `[prompts, tokens]`, float32: `1/n` for each of n correct tokens, `-1/n` for each of n wrong ones, and
            0 where there is none.
        correct, wrong: The token ids of each, padded with -1; `wrong` is None where logits are no differences.
    """

    ids: torch.Tensor
    weights: torch.Tensor
    correct: torch.Tensor
    wrong: torch.Tensor | None

    def of(self, logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """The logit (difference) of each prompt, `[rows]`, from logits `[rows, vocab]`."""
        picked = accumulated(logits.gather(1, self.ids[rows].to(logits.device)))
        return (picked * self.weights[rows].to(picked)).sum(1)


def targets_of(model: StandardizedTransformer, targets: Any, prompts: int) -> Targets:
    """What a user means by targets; see `direct_logit_attribution`.

    Raises:
        ValueError: They do not fit the prompts, or a text is not one token.
        TypeError: Something is no token.
    """
    name, wrong = "targets", None
    if isinstance(targets, list) and any(isinstance(entry, tuple) for entry in targets):
        if not all(isinstance(entry, tuple) and len(entry) == 2 for entry in targets):
            raise ValueError(
                "targets holds pairs (correct, wrong) for some prompts and something else for others; give each prompt "
                "a pair, or each a token or list of tokens."
            )
        targets = tuple([entry[side] for entry in targets] for side in (0, 1))
    if isinstance(targets, tuple):
        if len(targets) != 2:
            raise ValueError(
                f"targets is a tuple of {len(targets)}; a tuple is a pair (correct, wrong). Give a list for one entry "
                "per prompt."
            )
        wrong = ids_per_prompt(model, targets[1], prompts, "targets (wrong)")
        targets, name = targets[0], "targets (correct)"
    correct = ids_per_prompt(model, targets, prompts, name)
    sides = [(correct, 1.0)] if wrong is None else [(correct, 1.0), (wrong, -1.0)]
    ids = torch.cat([side for side, _ in sides], 1)
    weights = torch.cat([sign * (side >= 0) / (side >= 0).sum(1, keepdim=True) for side, sign in sides], 1)
    return Targets(ids.clamp(min=0), weights, correct, wrong)


@dataclass(frozen=True)
class Direction:
    """What the stream after the last layer is multiplied by.

    Attributes:
        vectors: `[rows, hidden]`, float32.
        bias: `[rows]`: what the final norm's and the unembedding's biases add to the logit.
        logits: `[rows]`: the logit (difference) of the run, before a softcap.
    """

    vectors: torch.Tensor
    bias: torch.Tensor
    logits: torch.Tensor


def direction_of(
    model: StandardizedTransformer, stream: torch.Tensor, targets: Targets, rows: torch.Tensor, real: torch.Tensor
) -> Direction:
    """The direction of each row's target, at that row's own scale of the final norm.

    Args:
        model: The model.
        stream: The stream after the last layer, `[rows, hidden]`.
        targets: The targets of all prompts.
        rows: For each row the index of its prompt.
        real: The model's own logits there, `[rows, vocab]`.

    Raises:
        Unavailable: Logits are not affine in the stream when the final norm's scale is held, or it is not known how
            they are made.
    """
    readout, module = _uncapped(model.readout), model._module
    paths = [path for path in (readout.ln_final, readout.lm_head) if path is not None]
    device = device_of(module, [module.get_submodule(path) for path in paths])
    with held_norms(model, *([readout.ln_final] if readout.ln_final is not None else [])):
        x = leaf(stream.to(device))
        logits = readout.project(module, x[:, None])[:, 0]
        found = targets.of(logits, rows)
        (slopes,) = torch.autograd.grad(found.sum(), x)
        zero = readout.project(module, torch.zeros_like(x[:1, None]))[:, 0].detach()
    vectors, found, logits = accumulated(slopes), found.detach(), logits.detach()
    bias = targets.of(zero.expand(len(rows), -1), rows)
    products = vectors * accumulated(stream.to(device))
    made = (products.sum(-1) + bias - found).abs()
    capped = targets.of(model.readout.chain.finish(logits), rows) if _is_capped(model.readout) else found
    own = (capped - targets.of(real.to(device), rows)).abs()
    size = products.norm(dim=-1) + bias.abs() + found.abs()
    allowed = tolerance(model)
    if not bool((own <= allowed * (size + logits.abs().amax(-1))).all()):
        raise Unavailable(
            f"direct_logit_attribution() is not served for {model.model_class} on this prompt: what it does after its "
            f"last layer ({model.readout}) does not give its own logits (they differ by {float(own.max()):.1e})."
        )
    if not bool((made <= allowed * size).all()):
        raise Unavailable(
            f"direct_logit_attribution() is not served for {model.model_class}: with the scale of its final norm held "
            f"still, its logits are no linear function of the stream and a bias (they differ by {float(made.max()):.1e}"
            f"): what it does after its last layer is {model.readout}."
        )
    return Direction(vectors, bias, found)


def _is_capped(readout: Readout) -> bool:
    return readout.way == "chain" and readout.chain.softcap is not None


def softcap_of(readout: Readout) -> float | None:
    """The softcap that is left out of the logits that are attributed; None if there is none."""
    return readout.chain.softcap if _is_capped(readout) else None


def _uncapped(readout: Readout) -> Readout:
    """The same readout without its softcap."""
    if not _is_capped(readout):
        return readout
    return Readout(
        readout.model_class,
        readout.ln_final,
        readout.lm_head,
        readout.layer_paths,
        Chain(readout.chain.scale),
        readout.layout,
        readout.way,
        readout.reason,
        readout.returns,
    )
