"""What is read of attention inside a trace: patterns at some queries and keys, and values through W_O."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from nnterp.errors import Unavailable
from nnterp.record import Record
from nnterp.traced import Apart, ThroughOut, bare
from nnterp.values import Site, Sum

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer

PATTERN, VALUES, HEADS = "attention_probabilities", "attention_values", "attention_head_outputs"
OUTPUT, ADDED = "attentions_output", "attention_contributions"
LARGEST = 1 << 24  # numbers that are made at once


class Carried(Record):
    """How what attention returns becomes what it adds to the stream.

    Attributes:
        norm: Path of a norm in between; None if there is none.
        factor: What it is multiplied by: a number or one per channel.
        constant: What is added, one number per channel, or None.
    """

    def __init__(self, norm: str | None, factor: Any, constant: torch.Tensor | None) -> None:
        self.norm, self.factor, self.constant = norm, factor, constant

    def through(self, model: Any, x: torch.Tensor, whole: bool = False) -> torch.Tensor:
        """What a part of attention's output adds, read by itself; with `whole` the constant as well."""
        if self.norm is not None:
            with Apart(model.interleaver):
                x = model._module.get_submodule(self.norm)(x)
        x = x * (self.factor.to(x) if isinstance(self.factor, torch.Tensor) else self.factor)
        return x if self.constant is None or not whole else x + self.constant.to(x)


def carried(model: StandardizedTransformer, layer: int) -> Carried:
    """How the output of one layer's attention is carried to the stream.

    Raises:
        Unavailable: It is not known, or it is more than a norm and a factor.
    """
    place, block = bare(model.place(ADDED, layer)), model.anatomy.blocks[layer]
    if isinstance(place, Site) and place.side == "output":
        place = Sum(((place.path, 1.0),))
    if not isinstance(place, Sum) or len(place.terms) != 1:
        raise Unavailable(
            f"Layer {layer} of {model.anatomy.model_class}: attention's part of the stream is no multiple of one "
            "module's output, so what a single head adds cannot be read by itself."
        )
    ((path, factor),) = place.terms
    own = block.self_attn.path if block.self_attn is not None else ""
    return Carried(None if path == own or path.startswith(f"{own}.") else path, factor, place.constant)


def through_out(model: StandardizedTransformer, layer: int) -> None:
    """Raise unless each head's output through W_O can be computed in this layer.

    Raises:
        Unavailable: It cannot.
    """
    if not isinstance(bare(model.place("attention_head_contributions", layer)), ThroughOut):
        raise Unavailable(f"Layer {layer} of {model.anatomy.model_class}: single heads cannot be put through W_O.")


def by_head(values: torch.Tensor, heads: int) -> torch.Tensor:
    """Values `[..., kv_heads, head_dim]` as each head reads them, `[..., heads, head_dim]`."""
    return values.repeat_interleave(max(1, heads // values.shape[-2]), dim=-2)


def mixing_error(pattern: torch.Tensor, values: torch.Tensor, heads: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """How far the heads' outputs are from pattern × values, relative to the largest of them; infinite if shapes differ.

    Args:
        pattern: `[batch, heads, query, key]`.
        values: `[batch, key, heads, head_dim]`.
        heads: `[batch, query, heads, head_dim]`.
        own: `[batch, query]`, True at the prompts' own tokens.
    """
    shapes = (pattern.shape[0], pattern.shape[2], pattern.shape[1], values.shape[-1])
    if heads.shape != shapes or pattern.shape[3] != values.shape[1] or pattern.shape[1] != values.shape[2]:
        return torch.tensor(float("inf"))
    clean = pattern.masked_fill(~own.to(pattern.device)[:, None, :, None], 0)
    made = torch.einsum("bhqk,bkhd->bqhd", clean, values.to(clean))
    return difference(made, heads, own)


def difference(made: torch.Tensor, real: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """The largest difference at the prompts' own tokens, relative to the largest number; infinite if shapes differ."""
    if made.shape != real.shape:
        return torch.tensor(float("inf"))
    own = own.to(real.device)
    expected, found = real[own].float(), made.to(real.device)[own].float()
    return ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).nan_to_num(nan=torch.inf)


def norms_through(model: Any, layer: int, values: torch.Tensor, hidden: int) -> torch.Tensor:
    """The norm of each value through W_O, float32: `[batch, key, heads, head_dim]` to `[batch, key, heads]`."""
    place = bare(model.place("attention_head_contributions", layer))
    batch, keys, heads, _ = values.shape
    # W_O that is no plain linear layer is given one head at a time, with zeros for the others.
    most = max(1, LARGEST // (batch * heads * max(heads * values.shape[-1], hidden)))
    parts = [place.through(model, values[:, i : i + most]).float().norm(dim=-1) for i in range(0, keys, most)]
    return torch.cat(parts, dim=1)


def added_by(model: Any, layer: int, values: torch.Tensor, how: Carried) -> torch.Tensor:
    """What each head adds to the stream of values alone: `[spots, heads, head_dim]` to `[spots, heads, hidden]`."""
    place = bare(model.place("attention_head_contributions", layer))
    return how.through(model, place.through(model, values[:, None])[:, 0])


def summed(found: torch.Tensor, groups: torch.Tensor, weights: torch.Tensor, count: int) -> torch.Tensor:
    """Weighted sums of `[looks, heads]` over the looks of each group, float32 `[count, heads]`."""
    weighted = found.float() * weights.to(found.device)[:, None]
    made = torch.zeros(count, found.shape[1], device=found.device)
    return made.index_add_(0, groups.to(found.device), weighted)


def tolerance(dtype: torch.dtype) -> float:
    """The largest relative difference that counts as equal in a dtype."""
    return max(1e-3, 8 * torch.finfo(dtype).eps)


def refuse(model: StandardizedTransformer, errors: dict[int, float], limit: float, what: str) -> None:
    """Raise for layers whose numbers are not what a function assumes.

    Raises:
        Unavailable: An error is above the limit; names the layers.
    """
    wrong = [layer for layer, error in errors.items() if not error <= limit]
    if wrong:
        raise Unavailable(
            f"{model.anatomy.model_class}: {what} in layers {', '.join(map(str, wrong))} (relative error "
            f"{max(errors[layer] for layer in wrong):.2g}, allowed {limit:.2g}), so the numbers would be wrong there. "
            "Choose other layers with layers=."
        )
