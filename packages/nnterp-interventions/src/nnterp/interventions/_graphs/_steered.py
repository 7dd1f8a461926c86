"""Runs of a prompt in which features are set: of the local replacement model, and of the model itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

import torch

from nnterp.frozen import Tape, freeze
from nnterp.interventions._attribution import accumulated
from nnterp.interventions._graphs._runs import Seen, run
from nnterp.interventions._graphs._sites import Sites
from nnterp.traced import Dictionary

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer

Values: TypeAlias = Mapping[int, Sequence[tuple[int, int, float]]]  # layer → (position, feature, activation)
_KINDS = ("patterns", "norms")


class Steered:
    """Runs of one prompt with some features' activations set.

    Args:
        model: The model.
        sites: Where transcoders read and write.
        ids: Token ids, `[seq]`.
        masked: Positions that have features, bool `[seq]`.
    """

    def __init__(self, model: StandardizedTransformer, sites: Sites, ids: torch.Tensor, masked: torch.Tensor) -> None:
        self.model, self.sites, self.ids, self.masked = model, sites, ids, masked
        self.dictionaries = {own.layer: own.dictionary for own in sites.replaced}
        self.tape = Tape()
        self.outs: dict[int, torch.Tensor] = {}
        self.errors: dict[int, torch.Tensor] = {}

    def unedited(self) -> tuple[Seen, Seen]:
        """A run of the model, which records patterns and scales, and one of the local replacement model."""

        encoded: dict[int, torch.Tensor] = {}

        def put(layer: int, x: torch.Tensor, out: torch.Tensor) -> None:
            self.outs[layer] = out.detach().clone()
            dictionary = self.dictionaries.get(layer)
            if dictionary is not None:
                encoded[layer] = self._encode(dictionary, x)
                self.errors[layer] = accumulated(out) - accumulated(self.sites.decode(encoded, layer, x)).to(out.device)

        with freeze(self.model, _KINDS, self.tape):
            plain = run(self.model, self.sites, self.ids[None], put)
        return plain, self.steered({}, True)

    def steered(self, values: Values, frozen: bool) -> Seen:
        """A run with some activations set.

        Args:
            values: Layer → (position, feature, activation).
            frozen: Whether it is one of the local replacement model: all features are encoded anew, errors are
                constant, patterns and scales those that were recorded. Otherwise it is one of the model.
        """

        encoded: dict[int, torch.Tensor] = {}
        changes: dict[int, torch.Tensor] = {}

        def put(layer: int, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor | None:
            dictionary = self.dictionaries.get(layer)
            if dictionary is None:
                return self.outs[layer] if frozen else None
            own = values.get(layer, ())
            if frozen or own:
                old = features = self._encode(dictionary, x)
                if own:
                    features = features.clone()
                    for position, feature, value in own:
                        features[0, position, feature] = value
                    changes[layer] = features - old
                encoded[layer] = features
            if frozen:
                made = accumulated(self.sites.decode(encoded, layer, x)).to(out.device) + self.errors[layer]
                return torch.where(self.masked[:, None].to(out.device), made, accumulated(self.outs[layer]))
            new = accumulated(out)
            for source in self.sites.into(layer):
                if source in changes:
                    decoder = accumulated(self.sites.decoder(source, layer))
                    new = new + (accumulated(changes[source]) @ decoder).to(out.device)
            return new

        if not frozen:
            return run(self.model, self.sites, self.ids[None], put, logits=False)
        with freeze(self.model, _KINDS, self.tape):
            return run(self.model, self.sites, self.ids[None], put, logits=False)

    def _encode(self, dictionary: Dictionary, x: torch.Tensor) -> torch.Tensor:
        """Features, 0 where positions have none, `[1, seq, features]`."""
        features = dictionary.encode(x)
        return features * self.masked[:, None].to(features)
