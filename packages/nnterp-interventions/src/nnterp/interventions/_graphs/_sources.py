"""What writes into the stream in the local replacement model: features, errors, token embeddings and biases."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from nnterp.interventions._attribution import accumulated
from nnterp.interventions._graphs._runs import Seen
from nnterp.interventions._graphs._sites import Layer, Sites
from nnterp.traced import Dictionary

_ROWS = 4096  # decoder rows that are copied at once


@dataclass(frozen=True)
class Written:
    """What the sources of one layer write.

    Attributes:
        own: The layer.
        first: Index of its first feature among all.
        starts: For each position the index of its first feature among the layer's, and their number at the end.
        features: Ids of the active features, position by position, int64.
        activations: Their activations, float32.
        errors: What the feed-forward returned less what the transcoder makes of its input, `[seq, hidden]`, float32.
        masked: Positions that have features, bool `[seq]`; at the others all is an error.
    """

    own: Layer
    first: int
    starts: tuple[int, ...]
    features: torch.Tensor
    activations: torch.Tensor
    errors: torch.Tensor
    masked: torch.Tensor


@dataclass(frozen=True)
class Sources:
    """All sources of one prompt.

    Attributes:
        layers: What each layer with a feed-forward writes.
        features: (layer, position, feature id) of each active feature, int64 `[features, 3]`, in that order.
        activations: `[features]`, float32.
        pre_activations: What the activation function was given, `[features]`, float32.
        slopes: Derivatives of activations by pre-activations, `[features]`, float32.
        entering: The stream entering the first layer, `[seq, hidden]`, float32.
    """

    layers: tuple[Written, ...]
    features: torch.Tensor
    activations: torch.Tensor
    pre_activations: torch.Tensor
    slopes: torch.Tensor
    entering: torch.Tensor

    @property
    def seq(self) -> int:
        """Tokens of the prompt."""
        return len(self.entering)

    @property
    def count(self) -> int:
        """How many sources there are: features, errors of all layers and positions, embeddings of all positions."""
        return len(self.features) + (len(self.layers) + 1) * self.seq


def sources_of(sites: Sites, seen: Seen, masked: torch.Tensor) -> Sources:
    """The sources of one prompt.

    Args:
        sites: Where transcoders read and write.
        seen: A run of the prompt alone, in which nothing was replaced.
        masked: Positions that have features, bool `[seq]`.
    """
    layers, tables, acts, pres, slopes = [], [], [], [], []
    encoded: dict[int, torch.Tensor] = {}
    first = 0
    for own in sites.layers:
        out = accumulated(seen.values[own.writes][0]).cpu()
        if own.dictionary is None:
            nothing = torch.zeros(0)
            layers.append(Written(own, first, (0,) * (len(out) + 1), nothing.long(), nothing, out, masked & False))
            continue
        x = seen.values[own.reads][0]
        pre, features, slope = activated(own.dictionary, x)
        features = encoded[own.layer] = features * masked[:, None].to(features)
        made = accumulated(sites.decode(encoded, own.layer, x.to(features.device))).cpu()
        at = features.nonzero().cpu()
        values = accumulated(features).cpu()[at[:, 0], at[:, 1]]
        starts = torch.searchsorted(at[:, 0].contiguous(), torch.arange(len(out) + 1))
        errors = torch.where(masked[:, None], out - made, out)
        layers.append(Written(own, first, tuple(starts.tolist()), at[:, 1], values, errors, masked))
        tables.append(torch.cat([torch.full((len(at), 1), own.layer), at], 1))
        acts.append(values)
        pres.append(accumulated(pre).cpu()[at[:, 0], at[:, 1]])
        slopes.append(accumulated(slope).cpu()[at[:, 0], at[:, 1]])
        first += len(at)
    entering = accumulated(seen.values[sites.entering][0]).cpu()
    return Sources(tuple(layers), torch.cat(tables), torch.cat(acts), torch.cat(pres), torch.cat(slopes), entering)


def activated(dictionary: Dictionary, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pre-activations, features, and the derivatives of features by their pre-activations, each `[..., features]`."""
    with torch.inference_mode(False), torch.enable_grad():
        pre = dictionary.pre_activations(x.detach()).detach().clone().requires_grad_(True)
        features = dictionary.activation(pre)
        (slope,) = torch.autograd.grad(features.sum(), pre)
    return pre.detach(), features.detach(), slope


def encoders(dictionary: Dictionary, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The linear maps from what is encoded to pre-activations: `[n, width]`, and what they add, `[n]`; float32."""
    features = features.to(dictionary.encoder.device)
    rows = accumulated(dictionary.encoder[features])
    added = accumulated(dictionary.encoder_bias[features])
    if dictionary.input_bias is not None:
        added = added - rows @ accumulated(dictionary.input_bias)
    return rows.cpu(), added.cpu()


def edges_from(
    sites: Sites, sources: Sources, slopes: Mapping[int, torch.Tensor], entering: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Direct effects of all sources on some targets.

    Args:
        sites: Where transcoders read and write.
        sources: The sources.
        slopes: Layer → the gradient of each target by what takes the place of its feed-forward, `[targets, seq,
            hidden]`; layers that no target depends on are left out.
        entering: The gradient of each target by the stream that enters the first layer, `[targets, seq, hidden]`.

    Returns:
        `[targets, sources]`: features, errors layer by layer, embeddings; and what the decoders' biases add,
        `[targets]`. Float32, on the CPU.
    """
    targets, seq = entering.shape[:2]
    found = torch.zeros(targets, sources.count, dtype=sources.entering.dtype)
    biases = torch.zeros(targets, dtype=sources.entering.dtype)
    errors = len(sources.features)
    for place, written in enumerate(sources.layers):
        slope = slopes.get(written.own.layer)
        if slope is None:
            continue
        slope = accumulated(slope)
        begin = errors + place * seq
        found[:, begin : begin + seq] = torch.einsum("tsh,sh->ts", slope, written.errors.to(slope.device)).cpu()
        dictionary = written.own.dictionary
        if dictionary is None:
            continue
        bias = accumulated(dictionary.decoder_bias).to(slope.device)
        biases += (slope[:, written.masked.to(slope.device)].sum(1) @ bias).cpu()
        for source in sites.into(written.own.layer):
            decoder = sites.decoder(source, written.own.layer)
            _add_features(found, slope, decoder, next(own for own in sources.layers if own.own.layer == source))
    entering = accumulated(entering)
    found[:, -seq:] = torch.einsum("tsh,sh->ts", entering, sources.entering.to(entering.device)).cpu()
    return found, biases


def _add_features(found: torch.Tensor, slope: torch.Tensor, decoder: torch.Tensor, written: Written) -> None:
    """Add to `[targets, sources]` what one layer's features do through what they write to one layer.

    Args:
        found: What is added to.
        slope: The gradient of each target by what is written, `[targets, seq, hidden]`.
        decoder: What the features write, `[features, hidden]`.
        written: Those that are active.
    """
    for position, (start, end) in enumerate(zip(written.starts, written.starts[1:], strict=False)):
        here = slope[:, position]
        for low in range(start, end, _ROWS):
            some = slice(low, min(end, low + _ROWS))
            rows = accumulated(decoder[written.features[some].to(decoder.device)])
            made = (here @ rows.to(here.device).T).cpu() * written.activations[some]
            found[:, written.first + some.start : written.first + some.stop] += made
