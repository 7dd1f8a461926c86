"""The residual stream after the last layer as a sum: the stream entering the first layer and what every part adds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch

from nnterp.discovery import ResidualStructure, rounding_of
from nnterp.errors import Unavailable

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer

Role: TypeAlias = Literal["embeddings", "entering", "attention", "mixer", "mlp", "other"]
Factor: TypeAlias = float | torch.Tensor  # one number, or one per channel
Read: TypeAlias = tuple[str, int]  # a value's name and its layer

_SUMS = ("sequential", "parallel", "single", "silent")


@dataclass(frozen=True)
class Term:
    """One addend of the stream after the last layer.

    Attributes:
        role: "embeddings" (the stream entering the first layer: token embeddings, positions and their norm), "entering"
            (in a looped model, the stream that the last pass begins with), "attention", "mixer" (any other sequence
            mixer), "mlp", or "other" (further modules of a layer).
        layer: The layer that adds it; the first one of the sum for "embeddings" and "entering".
        read: The value that holds it, `[batch, seq, hidden]`.
        less: A value to subtract from it; None for nearly every term. Of two mixers of a layer, what the first adds is
            read as what both add less what the attention adds.
        factor: What the layers after it multiply the stream by; 1 for nearly every model.
    """

    role: Role
    layer: int
    read: Read
    less: Read | None = None
    factor: Factor = 1.0

    @property
    def label(self) -> str:
        """What results call it: "embeddings", "entering L8", "L3 attention", "L3 mixer", "L3 mlp", "L3 other"."""
        if self.role == "entering":
            return f"entering L{self.layer}"
        return "embeddings" if self.role == "embeddings" else f"L{self.layer} {self.role}"

    @property
    def reads(self) -> tuple[Read, ...]:
        """The values that it is made of."""
        return (self.read,) if self.less is None else (self.read, self.less)

    def of(self, values: Mapping[Read, torch.Tensor]) -> torch.Tensor:
        """The term in one run, as it stands in the stream after the last layer.

        Args:
            values: What was read: `reads` → a tensor `[..., hidden]`.
        """
        whole = accumulated(values[self.read])
        if self.less is not None:
            whole = whole - accumulated(values[self.less]).to(whole.device)
        return times(whole, self.factor)


def terms_of(model: StandardizedTransformer, what: str = "direct_logit_attribution()") -> list[Term]:
    """The terms of the stream after the last layer, in forward order; the layers that run on texts count.

    In a looped model the sum reaches back to the last place where the model's own code stands in the stream, because
    what stands there need not be linear. What enters the layer after it is one term.

    Args:
        model: The model; it is certified.
        what: The function that needs them, for errors.

    Raises:
        Unavailable: The stream is no sum of what the parts add: a layer normalises it in between (BERT), it is not
            known what a layer adds, or the model keeps several streams.
        Unproven: Nothing has proven what the layers add.
    """
    layout = model.readout.layout
    if layout.batch != 0 or layout.width not in (None, model.hidden_size):
        raise Unavailable(f"{what} needs one residual stream, and {model.model_class} keeps several side by side.")
    begin = max(model.anatomy.seams, default=0)
    layers = [layer for layer in range(begin, model.num_layers) if layer not in model.facts.only_with_image]
    if model.anatomy.between:
        raise Unavailable(
            f"{what} is not served for {model.model_class}: {', '.join(model.anatomy.between[:3])} add to the stream "
            "between its layers."
        )
    factor: Factor = 1.0
    terms: list[Term] = []
    for layer in reversed(layers):
        structure = structure_of(model, layer, what)
        terms += reversed(_added_by(model, layer, structure, factor))
        factor = product(factor, structure.stream_scale)
    terms.append(Term("entering" if begin else "embeddings", layers[0], ("layers_input", layers[0]), factor=factor))
    return terms[::-1]


def structure_of(model: StandardizedTransformer, layer: int, what: str) -> ResidualStructure:
    """How a layer's parts make its output, which is a sum; arguments and errors as `terms_of`."""
    structure = model.facts.residual_of(layer)
    if structure.kind in _SUMS:
        return structure
    why = (
        f"it is not known what its parts add to the stream ({structure.reason})"
        if structure.kind == "unknown"
        else "it normalises the stream between its parts, so that what leaves it is no sum of what they add"
    )
    raise Unavailable(f"{what} is not served for {model.model_class}: layer {layer}: {why}.")


def _added_by(model: StandardizedTransformer, layer: int, structure: ResidualStructure, factor: Factor) -> list[Term]:
    """What one layer adds to the stream, in the order mixer, attention, feed-forward, others."""
    block, terms = model.anatomy.blocks[layer], list[Term]()
    if structure.mixer is not None and block.mixer is not None:
        whole, attention = ("mixer_contributions", layer), ("attention_contributions", layer)
        if block.self_attn == block.mixer:
            terms.append(Term("attention", layer, attention, factor=factor))
        elif block.self_attn is not None and len(structure.mixer.terms) > 1:
            terms.append(Term("mixer", layer, whole, attention, factor))
            terms.append(Term("attention", layer, attention, factor=factor))
        else:
            terms.append(Term("mixer", layer, whole, factor=factor))
    if structure.mlp is not None:
        terms.append(Term("mlp", layer, ("mlp_contributions", layer), factor=factor))
    if structure.other is not None:
        terms.append(Term("other", layer, ("other_contributions", layer), factor=factor))
    return terms


def check_sum(model: StandardizedTransformer, terms: Sequence[torch.Tensor], stream: torch.Tensor, what: str) -> None:
    """Raise unless terms add up to the stream after the last layer in this run.

    Args:
        model: The model.
        terms: What `Term.of` gives, `[..., hidden]` each.
        stream: The stream after the last layer, `[..., hidden]`.
        what: The function that needs it, for errors.

    Raises:
        Unavailable: They do not, up to rounding in the model's dtype.
    """
    whole = sum((term.to(stream.device) for term in terms[1:]), terms[0].to(stream.device))
    error = apart(whole, stream, terms)
    if not error <= (allowed := tolerance(model)):
        raise Unavailable(
            f"{what} is not served for {model.model_class} on this prompt: what its parts add to the stream does not "
            f"add up to the stream after the last layer (relative error {error:.1e}, {allowed:.0e} is rounding)."
        )


def tolerance(model: StandardizedTransformer) -> float:
    """The largest relative error that counts as rounding: 1e-4 in float32 and float64, 16 roundings below."""
    return max(1e-4, 16 * rounding_of(model._module))


def apart(found: torch.Tensor, expected: torch.Tensor, terms: Sequence[torch.Tensor] = ()) -> float:
    """The largest error over positions of a sum, relative to the norm of its largest term or of what is expected."""
    expected = accumulated(expected)
    size = expected.norm(dim=-1)
    for term in terms:
        size = torch.maximum(size, term.norm(dim=-1).to(size.device))
    error = (accumulated(found).to(expected.device) - expected).norm(dim=-1) / size.clamp(min=1e-30)
    worst = float(error.max()) if error.numel() else 0.0
    return worst if worst == worst else float("inf")


def accumulated(tensor: torch.Tensor) -> torch.Tensor:
    """In the dtype in which terms are added up: float32, or float64 as it is."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def times(tensor: torch.Tensor, factor: Factor) -> torch.Tensor:
    """A multiple; the tensor itself for a factor of 1."""
    if isinstance(factor, torch.Tensor):
        return tensor * factor.to(tensor)
    return tensor if factor == 1.0 else tensor * factor


def product(a: Factor, b: Factor) -> Factor:
    """The factor of two multiplications."""
    if isinstance(a, torch.Tensor):
        return times(a, b)
    return times(b, a) if isinstance(b, torch.Tensor) else a * b
