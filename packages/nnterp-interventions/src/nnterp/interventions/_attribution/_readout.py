"""The direction of the stream after the last layer whose product with the stream is the logit, but for biases.

With the scale of the final norm held still at its value in the run, the logit of a token (before a softcap) is affine
in the stream: `logit = direction · stream + bias`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nnterp.devices import device_of
from nnterp.errors import Unavailable
from nnterp.interventions._attribution._held import held_norms, leaf
from nnterp.interventions._attribution._terms import accumulated, tolerance
from nnterp.interventions._tokens import ids_per_prompt
from nnterp.traced import Apart, Chain, Readout

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
        centred: Whether logits are differences from the mean logit of all tokens.
    """

    ids: torch.Tensor
    weights: torch.Tensor
    correct: torch.Tensor
    wrong: torch.Tensor | None
    centred: bool = False

    def of(self, picked: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """The logit (difference) of each row, `[rows]`, from the logits of its `ids`, `[rows, tokens]`."""
        return (accumulated(picked) * self.weights[rows].to(picked.device)).sum(1)


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


class Unembedding:
    """What a model does after its last layer, with the scale of the final norm held still.

    Args:
        model: The model.
        targets: The targets of all prompts.
        what: The function that needs it, for errors.

    Attributes:
        head: The unembedding, where the rows of its matrix can be used alone: a plain linear layer.
    """

    def __init__(
        self, model: StandardizedTransformer, targets: Targets, what: str = "direct_logit_attribution()"
    ) -> None:
        self.model, self.targets, self.what = model, targets, what
        self.readout = _uncapped(model.readout)
        head = None if self.readout.lm_head is None else model._module.get_submodule(self.readout.lm_head)
        weight: Any = getattr(head, "weight", None)
        plain = type(head) is nn.Linear and type(weight) is nn.Parameter and weight.device.type != "meta"
        self.head = head if plain and self.readout.way == "chain" else None

    def direction(self, stream: torch.Tensor, rows: torch.Tensor, real: torch.Tensor) -> Direction:
        """The direction of each row's target, at that row's own scale of the final norm.

        Args:
            stream: The stream after the last layer, `[rows, hidden]`.
            rows: For each row the index of its prompt.
            real: The model's own logits there, `[rows, vocab]`.

        Raises:
            Unavailable: Logits are not affine in the stream when the final norm's scale is held, or it is not known
                how they are made.
        """
        norm, head, module = self.readout.ln_final, self.readout.lm_head, self.model._module
        first = [module.get_submodule(path) for path in (norm, head) if path is not None]
        with held_norms(self.model, *([norm] if norm is not None else [])):
            x = leaf(stream.to(device_of(module, first)))
            logits, found = self._wanted(x, rows)
            (slopes,) = torch.autograd.grad(found.sum(), x)
            bias = self._wanted(torch.zeros_like(x), rows)[1].detach()
        vectors, found = accumulated(slopes), found.detach()
        own = accumulated(real.gather(1, self.targets.ids[rows].to(real.device))).to(logits.device)
        self._check(vectors * accumulated(x.detach()), bias, found, logits.detach(), own)
        return Direction(vectors, bias, found)

    @torch.no_grad()
    def logits(self, stream: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """What targets make of the logits of streams `[rows, hidden]`, the final norm not held still: `[rows]`.

        Args:
            stream: The stream after the last layer.
            rows: For each row the index of its prompt.
        """
        with Apart(self.model.interleaver):
            return self._wanted(stream, rows)[1]

    def _wanted(self, stream: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The logits of each row's tokens, `[rows, tokens]`, and what the targets make of them, `[rows]`."""
        picked, mean = self._picked(stream, self.targets.ids[rows])
        found = self.targets.of(picked, rows)
        if mean is not None:
            found = found - mean * self.targets.weights[rows].to(mean.device).sum(1)
        return picked, found

    def _picked(self, stream: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The logits of some tokens, `[rows, tokens]`, before a softcap, of streams `[rows, hidden]`; and where targets
        are centred, the mean logit of all tokens, `[rows]`."""
        module, readout, centred = self.model._module, self.readout, self.targets.centred
        ids = ids.to(stream.device)
        if self.head is None:
            logits = accumulated(readout.project(module, stream[:, None])[:, 0])
            return logits.gather(1, ids.to(logits.device)), logits.mean(1) if centred else None
        if readout.ln_final is not None:
            stream = module.get_submodule(readout.ln_final)(stream)
        weight, bias = self.head.weight, self.head.bias
        ids = ids.to(weight.device)
        stream, scale = accumulated(stream).to(weight.device), readout.chain.scale
        logits = torch.einsum("rh,rth->rt", stream, accumulated(weight[ids]))
        logits = (logits if bias is None else logits + accumulated(bias[ids])) * scale
        if not centred:
            return logits, None
        mean = stream @ accumulated(weight).mean(0)
        return logits, (mean if bias is None else mean + accumulated(bias).mean()) * scale

    def _check(
        self, products: torch.Tensor, bias: torch.Tensor, found: torch.Tensor, logits: torch.Tensor, real: torch.Tensor
    ) -> None:
        """Raise unless the logits found are the model's own, `[rows, tokens]`, and affine in the stream."""
        model, size = self.model, products.norm(dim=-1) + bias.abs() + found.abs()
        allowed = tolerance(model)
        capped = Chain(1.0, softcap_of(model.readout)).finish(logits)
        own, made = (capped - real).abs().amax(-1), (products.sum(-1) + bias - found).abs()
        if not bool((own <= allowed * (size + logits.abs().amax(-1))).all()):
            raise Unavailable(
                f"{self.what} is not served for {model.model_class} on this prompt: what it does after "
                f"its last layer ({model.readout}) does not give its own logits (they differ by {own.max():.1e})."
            )
        if not bool((made <= allowed * size).all()):
            raise Unavailable(
                f"{self.what} is not served for {model.model_class}: with the scale of its final norm "
                f"held still, its logits are no linear function of the stream and a bias (they differ by "
                f"{float(made.max()):.1e}): what it does after its last layer is {model.readout}."
            )


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
