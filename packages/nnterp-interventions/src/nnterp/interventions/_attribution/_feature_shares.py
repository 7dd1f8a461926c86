"""What each feature of the attached dictionaries has in the stream after the last layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from nnterp.errors import Unavailable
from nnterp.interventions._attribution._terms import Read, Term, accumulated, times
from nnterp.traced import Features
from nnterp.values import canonical

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer


@dataclass(frozen=True)
class FeatureShares:
    """A dictionary, and the terms of the stream that it decodes to.

    Attributes:
        features: The dictionary's features.
        read: The value that holds them.
        terms: The terms that its features and its error add up to, which stand one after the other.
        label: What is left of the terms is called "`label` error".
    """

    features: Features
    read: Read
    terms: tuple[Term, ...]
    label: str

    def scores(self, features: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
        """`[rows, features]`: each feature times the product of its direction with the target's.

        Args:
            features: `[rows, features]`.
            vectors: The target's directions in the stream after the last layer, `[rows, hidden]`.
        """
        decoder = accumulated(self.features.dictionary.decoder)
        along = times(vectors, self.terms[-1].factor).to(decoder)
        return accumulated(features) * (along @ decoder.T)


def feature_shares(model: StandardizedTransformer, terms: Sequence[Term], what: str) -> list[FeatureShares]:
    """For each attached dictionary, the terms that it decodes to.

    Args:
        model: The model.
        terms: Of its stream, in forward order.
        what: The function that needs them, for errors.

    Raises:
        Unavailable: No dictionary is attached, one writes something that is no term of the stream and no stream, or
            two of them decode to the same term.
        ValueError: Several dictionaries are attached to one layer.
    """
    found: list[FeatureShares] = []
    for layer in sorted({layer for layer, _ in model.attachments}):
        features = model.place("features", layer)
        assert isinstance(features, Features)
        value, at = canonical(features.writes)
        assert at is not None
        if value.name in ("layers_output", "layers_input"):
            last = at - (value.name == "layers_input")
            mine = tuple(term for term in terms if term.role == "embeddings" or term.layer <= last)
            label = f"L{last}" if last >= 0 else "embeddings"
        else:
            mine = tuple(
                term
                for term in terms
                if term.layer == at and term.less is None and model.place(*term.read) == features.write_place
            )
            label = mine[0].label if mine else ""
        if not mine:
            raise Unavailable(
                f'{what} by="feature": the dictionary at {features.reads} writes {features.writes}, which is not added '
                "as it is to the stream, so its features have no share of their own in it. Detach it."
            )
        if features.dictionary.scaling is not None and features.dictionary.scaling.restores:
            raise Unavailable(
                f'{what} by="feature": the dictionary at {features.reads} scales what it decodes by the norm of what '
                "it encoded, so that a feature has no direction of one length."
            )
        shared = [one for one in found if set(one.terms) & set(mine)]
        if shared:
            raise Unavailable(
                f'{what} by="feature": the dictionaries at {shared[0].features.reads} and {features.reads} both decode '
                "what the other's features are made of, so a logit is no sum over both. Detach one."
            )
        found.append(FeatureShares(features, ("features", layer), mine, label))
    if not found:
        raise Unavailable(f'{what} by="feature": attach a dictionary first: nnterp.attach(model, dictionary, at=...).')
    return found
