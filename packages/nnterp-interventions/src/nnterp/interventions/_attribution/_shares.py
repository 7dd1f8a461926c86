"""What each head, or each neuron, has in what its part adds to the residual stream.

A norm (Gemma 2 and 3, OLMo 2) and a multiplier (Granite) may stand between the last projection of an attention or
feed-forward and the stream. With the norm's scale held still at its value in the run, all of it is linear, so the
shares and the biases add up to the contribution (Elhage et al., "A Mathematical Framework for Transformer Circuits",
2021).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch

from nnterp.errors import Unavailable
from nnterp.interventions._attribution._held import HeldNorm, leaf
from nnterp.interventions._attribution._terms import Factor, Read, accumulated, apart, times, tolerance
from nnterp.traced import Apart, Place, Site, ThroughOut, View, bare

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer

Part: TypeAlias = Literal["attention", "mlp"]
Project: TypeAlias = Callable[[torch.Tensor], torch.Tensor]

_NAMES = {  # role in the anatomy, what is split, what is added
    "attention": ("self_attn", "attention_head_outputs", "attention_contributions"),
    "mlp": ("mlp", "mlp_neurons", "mlp_contributions"),
}


@dataclass(frozen=True)
class Shares:
    """The way from the heads of an attention, or the neurons of a feed-forward, to what the part adds to the stream.

    Attributes:
        model: The model.
        units: The value that is split, and its layer: "attention_head_outputs" or "mlp_neurons".
        contribution: What the part adds, and its layer: "attention_contributions" or "mlp_contributions".
        project: The part's last projection: `[batch, seq, heads, head_dim]` or `[batch, seq, neurons]` to
            `[batch, seq, hidden]`, its bias included; differentiable.
        norm: The norm after it, or no norm.
        scale: What its output is multiplied by.
        constant: What is added, `[hidden]`; None for nothing.
    """

    model: StandardizedTransformer
    units: Read
    contribution: Read
    project: Project
    norm: HeldNorm
    scale: Factor = 1.0
    constant: torch.Tensor | None = None

    def given(self, units: torch.Tensor) -> torch.Tensor:
        """What the projection returns in the run, its bias included: `[batch, seq, hidden]`, float32."""
        with Apart(self.model.interleaver), torch.no_grad():
            return accumulated(self.project(units))

    def bias(self, units: torch.Tensor) -> torch.Tensor:
        """What the projection adds beside the units, `[1, 1, hidden]`, float32: what it returns for zeros."""
        return self.given(torch.zeros_like(units[:1, :1]))

    def push(self, given: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
        """What addends of the projection's output become in the stream, the norm's scale held still.

        Args:
            given: What the projection returns in the run, `[..., hidden]`; see `given`.
            vectors: Addends of it, `[..., n, hidden]`.
        """
        return times(self.norm.push(given, vectors), self.scale)

    def rest(self, given: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """What no head or neuron has a share in: the biases of the projection and the norm, `[batch, seq, hidden]`."""
        pushed = self.push(given, bias.expand(given.shape).unsqueeze(-2)).squeeze(-2)
        rest = pushed + times(self.norm.bias(given), self.scale)
        return rest if self.constant is None else rest + self.constant.to(rest)

    def traced(self, units: torch.Tensor) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
        """What the projection returns in the run, and the way back through it.

        Args:
            units: Heads `[batch, seq, heads, head_dim]` or neurons `[batch, seq, neurons]` of the run.

        Returns:
            `given`, and a function from a direction `[batch, seq, hidden]` at the projection's output to what each
            entry of the units is multiplied by in the product with it: the shape of `units`, float32.
        """
        with torch.inference_mode(False), torch.enable_grad(), Apart(self.model.interleaver):
            x = leaf(units)
            y = self.project(x)

        def back(direction: torch.Tensor) -> torch.Tensor:
            (made,) = torch.autograd.grad(y, x, direction.detach().to(y))
            return accumulated(made)

        return accumulated(y.detach()), back

    def pull(self, given: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
        """The direction at the projection's output whose product with an addend is `direction · push(addend)`."""
        return self.norm.pull(given, times(direction, self.scale))

    def fitted(self, given: torch.Tensor, bias: torch.Tensor, whole: torch.Tensor) -> Shares:
        """This way, if the shares and the rest add up to what the part added in this run, at every position.

        Where a part multiplies what its last projection returns before it returns it itself (Falcon-H1's feed-forward),
        the multiplier is found from the run first: one number, for all positions and channels.

        Args:
            given: What the projection returned in the run, `[batch, seq, hidden]`.
            bias: What it returns for zeros.
            whole: What the part added, `[batch, seq, hidden]`.

        Raises:
            Unavailable: They do not add up; names the part.
        """
        error, allowed = self._error(given, bias, whole), tolerance(self.model)
        if error <= allowed:
            return self
        if self.norm.path is None and isinstance(self.scale, float) and self.constant is None:
            numbers, target = given.double().flatten(), whole.double().flatten().to(given.device)
            factor = float(numbers @ target / (numbers @ numbers))
            found = replace(self, scale=factor)
            if factor and found._error(given, bias, whole) <= allowed:
                return found
        name, layer = self.contribution
        raise Unavailable(
            f"{name}[{layer}] of {self.model.model_class} cannot be split: the shares of {self.units[0]} and the "
            f"biases do not add up to it (relative error {error:.1e}, {allowed:.0e} is rounding). Something that is "
            "not linear stands between its last projection and the stream."
        )

    def _error(self, given: torch.Tensor, bias: torch.Tensor, whole: torch.Tensor) -> float:
        shares = self.push(given, (given - bias).unsqueeze(-2)).squeeze(-2)
        return apart(shares + self.rest(given, bias), whole.detach())


def shares_of(model: StandardizedTransformer, part: Part, layer: int) -> Shares:
    """How what an attention or a feed-forward of one layer adds to the stream is split.

    Args:
        model: The model; it is certified.
        part: "attention" is split by head, "mlp" by neuron.
        layer: The layer, counted from 0.

    Raises:
        Unavailable: The layer has no such part, or no heads or neurons of it are served; says why.
        Unproven: Nothing has proven what the layer adds.
    """
    role, units, added = _NAMES[part]
    model.place(added, layer)
    structure, own = model.facts.residual_of(layer), model.anatomy.part(role, layer)
    contribution = structure.mlp if part == "mlp" else structure.mixer
    assert contribution is not None, "the value is served"
    terms = contribution.terms
    if part == "attention" and model.anatomy.blocks[layer].mixer != own:
        terms = terms[1:]
    if len(terms) != 1:
        raise Unavailable(
            f"{added}[{layer}] of {model.model_class} cannot be split: it is a sum of what several modules return "
            f"({', '.join(term.path for term in terms)})."
        )
    (term,) = terms
    project = _through_out(model, layer) if part == "attention" else _down(model, layer)
    inside = bool(own.leaves) or term.path == own.exit or term.path.startswith(f"{own.exit}.")
    norm = HeldNorm(model, None if inside else _norm_at(model, term.path, f"{added}[{layer}]"))
    return Shares(model, (units, layer), (added, layer), project, norm, term.scale, contribution.constant)


def head_shares(
    model: StandardizedTransformer, layer: int, heads: torch.Tensor, whole: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What each head of an attention adds to the stream in one run, after post-norms and multipliers.

    A post-norm's scale is held still at its value in the run. Under grouped queries every query head has a share of its
    own. Everything is a plain tensor of a finished run: call it outside of a trace, or inside one on what was read.

    Args:
        model: The model.
        layer: The layer, counted from 0.
        heads: `attention_head_outputs` of the run, `[batch, seq, heads, head_dim]`.
        whole: `attention_contributions` of the run, `[batch, seq, hidden]`.

    Returns:
        The shares `[batch, seq, heads, hidden]`, and what is left for biases `[batch, seq, hidden]`: float32 (float64
        in a float64 model), on the device of `heads`. Added up they are `whole`.

    Raises:
        Unavailable: The layer has no heads that are served, or shares and biases do not add up to `whole` within
            1e-4 of its norm (16 roundings in dtypes below float32).
    """
    way = shares_of(model, "attention", layer)
    place = _place(model, "attention_head_contributions", layer)
    assert isinstance(place, ThroughOut)
    with torch.no_grad():
        alone = accumulated(place.through(model, heads.detach()))
    given, bias = way.given(heads.detach()), way.bias(heads.detach())
    way = way.fitted(given, bias, whole)
    return way.push(given, alone), way.rest(given, bias)


def _norm_at(model: StandardizedTransformer, path: str, label: str) -> str | None:
    """The norm that stands between a part and the stream; None for a module without weights, such as a dropout.

    Raises:
        Unavailable: It is another module: a convolution moves information between positions.
    """
    module = model._module.get_submodule(path)
    if next(module.parameters(), None) is None and "norm" not in type(module).__name__.lower():
        return None
    if "norm" in type(module).__name__.lower():
        return path
    raise Unavailable(
        f"{label} of {model.model_class} cannot be split: {path}, a {type(module).__name__}, stands between its last "
        "projection and the stream, and is no norm."
    )


def _through_out(model: StandardizedTransformer, layer: int) -> Project:
    place = _place(model, "attention_head_contributions", layer)
    assert isinstance(place, ThroughOut)
    return lambda z: place.project(model, z.flatten(2))


def _down(model: StandardizedTransformer, layer: int) -> Project:
    place = _place(model, "mlp_neurons", layer)
    assert isinstance(place, Site)
    return model._module.get_submodule(place.path)


def _place(model: StandardizedTransformer, name: str, layer: int) -> Place:
    """Where a value is, without the layout that it is shown in."""
    place = bare(model.place(name, layer))
    return place.place if isinstance(place, View) else place
