"""The score of each part: the product of what it adds to the stream with the direction of the target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch

from nnterp.errors import Unavailable
from nnterp.interventions._attribution._feature_shares import FeatureShares, feature_shares
from nnterp.interventions._attribution._reading import KEYED, PATTERN, Reading
from nnterp.interventions._attribution._readout import Direction
from nnterp.interventions._attribution._shares import Shares, shares_of
from nnterp.interventions._attribution._terms import (
    Read,
    Term,
    accumulated,
    apart,
    check_sum,
    terms_of,
    times,
    tolerance,
)
from nnterp.interventions._layers import require_once

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer

By: TypeAlias = Literal["layer", "sublayer", "head", "neuron", "feature", "position", "token"]
BY: tuple[By, ...] = ("layer", "sublayer", "head", "neuron", "feature", "position", "token")
WHAT = "direct_logit_attribution()"


@dataclass(frozen=True)
class Parts:
    """The scores of one batch.

    Attributes:
        labels: The parts, in forward order; "bias" is the last.
        scores: `[rows, parts]`, float32.
        sources: `[rows, layers, heads, keys]`: of each head's score, what it took from each position of the padded
            batch; NaN where a layer has no such head. None if it was not asked for.
        size: `[rows]`, against which rounding is measured: the largest part of the logit, channel by channel.
    """

    labels: tuple[str, ...]
    scores: torch.Tensor
    size: torch.Tensor
    sources: torch.Tensor | None = None


class Plan:
    """What a call reads of every batch, and how it is split.

    Args:
        model: The model.
        by: How it is split.

    Attributes:
        terms: The addends of the stream after the last layer.
        ways: For each of them that is split, how.
        biases: For each of these, what its projection returns for zeros; filled by the first batch.
        features: The dictionaries that split it, each with the terms that it splits.
        reads: The values to read.

    Raises:
        Unavailable: The model's stream is no sum, or what was asked for cannot be split; says why.
    """

    def __init__(self, model: StandardizedTransformer, by: By) -> None:
        self.model, self.by = model, by
        if by in ("feature", "position", "token"):
            require_once(model, f'{WHAT} by="{by}"')
        self.terms = terms_of(model, WHAT)
        self.by_source = by in ("position", "token")
        self.ways: dict[Term, Shares] = {}
        self.biases: dict[Term, torch.Tensor] = {}
        if by == "head" or self.by_source:
            self.ways = {term: shares_of(model, "attention", term.layer) for term in self._of("attention")}
            if not self.ways:
                raise Unavailable(f'{WHAT} by="{by}": no layer of {model.model_class} has an attention with heads.')
        if by == "neuron":
            self.ways = self._by_neuron()
        self.features: list[FeatureShares] = feature_shares(model, self.terms, WHAT) if by == "feature" else []
        if self.by_source and (mixing := self._of("mixer")):
            raise Unavailable(
                f'{WHAT} by="{by}" is not served for {model.model_class}: the mixers of layers '
                f"{', '.join(str(term.layer) for term in mixing)} move information between positions without an "
                'attention pattern. by="sublayer" and by="head" are served.'
            )
        self.reads: list[Read] = [read for term in self.terms for read in term.reads]
        self.reads += [way.units for way in self.ways.values()]
        self.reads += [one.read for one in self.features]
        if self.by_source:
            self.reads += [(name, term.layer) for name in (PATTERN, KEYED) for term in self.ways]
            for name, layer in self.reads:
                model.place(name, layer)

    def _of(self, role: str) -> list[Term]:
        return [term for term in self.terms if term.role == role]

    def _by_neuron(self) -> dict[Term, Shares]:
        """The feed-forwards that have neurons; others, such as mixtures of experts, stay whole."""
        ways, reason = {}, None
        for term in self._of("mlp"):
            try:
                ways[term] = shares_of(self.model, "mlp", term.layer)
            except Unavailable as error:
                reason = reason or error
        if not ways:
            raise reason or Unavailable(f"{WHAT}: no layer of {self.model.model_class} has a feed-forward.")
        return ways

    def parts(self, reading: Reading, direction: Direction) -> Parts:
        """The scores of one batch.

        Raises:
            Unavailable: The terms do not add up to the stream of this run, or the shares to what a part adds.
        """
        values, vectors = reading.values, direction.vectors
        terms = {term: term.of(values).to(vectors.device) for term in self.terms}
        check_sum(self.model, list(terms.values()), reading.stream, WHAT)
        labels: list[str] = []
        columns: list[torch.Tensor] = []
        found: dict[int, torch.Tensor] = {}
        largest = torch.zeros_like(vectors)
        for term, added in terms.items():
            products = vectors * added
            largest = torch.maximum(largest, products.abs())
            if decoding := next((one for one in self.features if term in one.terms), None):
                if term == decoding.terms[-1]:
                    whole = sum((vectors * terms[own] for own in decoding.terms), torch.zeros_like(vectors)).sum(-1)
                    made = decoding.scores(values[decoding.read], vectors).to(whole.device)
                    labels += [f"L{decoding.read[1]}.F{i}" for i in range(made.shape[1])]
                    labels.append(f"{decoding.label} error")
                    columns += [made, (whole - made.sum(-1))[:, None]]
                continue
            if term not in self.ways:
                labels.append(term.label)
                columns.append(products.sum(-1, keepdim=True))
                continue
            scores, rest, sources = self._split(term, values, vectors)
            if sources is not None:
                found[term.layer] = sources
            unit = "H" if term.role == "attention" else "N"
            labels += [f"L{term.layer}.{unit}{i}" for i in range(scores.shape[1])]
            columns.append(scores)
            if rest is not None:
                labels.append(f"{term.label} bias")
                columns.append(rest[:, None])
        labels.append("bias")
        columns.append(direction.bias[:, None])
        whole = torch.cat([column.to(vectors.device) for column in columns], 1)
        size = largest.norm(dim=-1) + direction.bias.abs() + direction.logits.abs()
        if self.by == "layer":
            labels, whole = _by_layer(labels, whole)
        return Parts(tuple(labels), whole, size, self._stacked(found) if self.by_source else None)

    def _split(
        self, term: Term, values: dict[Read, torch.Tensor], vectors: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """The scores of a term's heads or neurons `[rows, units]`, of its biases `[rows]`, and by source."""
        way = self.ways[term]
        units = values[way.units][:, None]
        given, back = way.traced(units)
        if term not in self.biases:
            self.biases[term] = way.bias(units)
        bias = self.biases[term]
        way = way.fitted(given, bias, values[way.contribution][:, None])
        rest = way.rest(given, bias)
        along = times(vectors, term.factor)[:, None].to(given.device)
        slopes = back(way.pull(given, along))
        products = (accumulated(units) * slopes)[:, 0]
        scores = products if products.dim() == 2 else products.sum(-1)
        biased = bool(bias.any()) or bool(way.norm.bias(given).any()) or way.constant is not None
        sources = self._taken(term, values, slopes[:, 0]) if self.by_source else None
        return scores, (rest * along).sum(-1)[:, 0] if biased else None, sources

    def _taken(self, term: Term, values: dict[Read, torch.Tensor], slopes: torch.Tensor) -> torch.Tensor:
        """What each head takes from each key, `[rows, heads, keys]`.

        Raises:
            Unavailable: What W_O is given is not the average of the values under the pattern.
        """
        pattern = accumulated(values[PATTERN, term.layer])
        vectors = accumulated(values[KEYED, term.layer]).to(pattern.device)
        heads = accumulated(values[self.ways[term].units]).to(pattern.device)
        count, keys = pattern.shape[1], min(pattern.shape[-1], vectors.shape[1])
        error = float("inf")
        if count % vectors.shape[2] == 0 and vectors.shape[-1] == heads.shape[-1] and heads.shape[1] == count:
            vectors = vectors[:, -keys:].repeat_interleave(count // vectors.shape[2], 2)
            pattern = pattern[..., -keys:]
            error = apart(torch.einsum("bhk,bkhd->bhd", pattern, vectors).flatten(1), heads.flatten(1))
        if not error <= (allowed := tolerance(self.model)):
            raise Unavailable(
                f'{WHAT} by="{self.by}" is not served for {self.model.model_class}: in layer {term.layer}, what W_O is '
                "given is not the average of the values under the attention pattern (a gate or a norm stands between "
                f'them; relative error {error:.1e}, {allowed:.0e} is rounding). by="head" is served.'
            )
        return pattern * torch.einsum("bkhd,bhd->bhk", vectors, slopes.to(vectors.device))

    def _stacked(self, found: dict[int, torch.Tensor]) -> torch.Tensor:
        """`[rows, layers, heads, keys]` of all layers; NaN where a layer has fewer heads, or none."""
        first = next(iter(found.values()))
        heads = max(sources.shape[1] for sources in found.values())
        shape = (len(first), self.model.num_layers, heads, first.shape[-1])
        whole = torch.full(shape, float("nan"), dtype=first.dtype)
        for layer, sources in found.items():
            whole[:, layer, : sources.shape[1]] = sources.cpu()
        return whole


def _by_layer(labels: list[str], scores: torch.Tensor) -> tuple[list[str], torch.Tensor]:
    """The parts of each layer together."""
    names = [label if label.startswith("entering ") else label.split(" ")[0] for label in labels]
    once = list(dict.fromkeys(names))
    whole = scores.new_zeros(len(scores), len(once))
    whole.index_add_(1, torch.tensor([once.index(name) for name in names], device=scores.device), scores)
    return once, whole
