"""A dictionary: an encoder of activations into sparse features, and a decoder of features into activations."""

from __future__ import annotations

from typing import Any

import torch

from nnterp.record import Record


class Activation(Record):
    """What makes features of pre-activations `[..., features]`: those that are positive stay, the others become 0."""

    def __call__(self, pre: torch.Tensor) -> torch.Tensor:
        """Features, in the shape of `pre`."""
        return pre.relu()


class JumpRelu(Activation):
    """Keeps what is above its feature's threshold (Rajamanoharan et al. 2024, Jumping Ahead, eq. 1).

    Attributes:
        threshold: `[features]`, or one number in a tensor of no axes.
    """

    def __init__(self, threshold: torch.Tensor) -> None:
        self.threshold = threshold

    def __call__(self, pre: torch.Tensor) -> torch.Tensor:
        """Features, in the shape of `pre`."""
        return torch.where(pre > self.threshold.to(pre), pre, torch.zeros_like(pre)).relu()


class TopK(Activation):
    """Keeps the `k` largest of each position (Gao et al. 2024, Scaling and evaluating sparse autoencoders, 2.3).

    Attributes:
        k: How many features of a position are kept.
        signed: Whether one of them that is negative stays negative; it becomes 0 otherwise.
    """

    def __init__(self, k: int, signed: bool = False) -> None:
        self.k, self.signed = k, signed

    def __call__(self, pre: torch.Tensor) -> torch.Tensor:
        """Features, in the shape of `pre`."""
        largest = pre.topk(self.k, dim=-1)
        values = largest.values if self.signed else largest.values.relu()
        return torch.zeros_like(pre).scatter(-1, largest.indices, values)


class GroupMax(Activation):
    """Keeps the largest of each of `k` groups of neighbouring features, as EleutherAI's sparsify does.

    Attributes:
        k: How many groups there are; they have the same size.
    """

    def __init__(self, k: int) -> None:
        self.k = k

    def __call__(self, pre: torch.Tensor) -> torch.Tensor:
        """Features, in the shape of `pre`."""
        groups = pre.relu().unflatten(-1, (self.k, -1))
        best = groups.max(dim=-1, keepdim=True)
        return torch.zeros_like(groups).scatter(-1, best.indices, best.values).flatten(-2)


class Gated(Activation):
    """Which features are active and how strongly are told apart (Rajamanoharan et al. 2024, Improving dictionary
    learning with gated sparse autoencoders, eq. 6). The two share the encoder's matrix, and each has its own bias: the
    dictionary's `encoder_bias` is zero.

    Attributes:
        gate_bias: `[features]`.
        magnitude_bias: `[features]`.
        log_scale: `[features]`, the paper's r_mag.
    """

    def __init__(self, gate_bias: torch.Tensor, magnitude_bias: torch.Tensor, log_scale: torch.Tensor) -> None:
        self.gate_bias, self.magnitude_bias, self.log_scale = gate_bias, magnitude_bias, log_scale

    def __call__(self, pre: torch.Tensor) -> torch.Tensor:
        """Features, in the shape of `pre`."""
        magnitude = pre * self.log_scale.to(pre).exp() + self.magnitude_bias.to(pre)
        return torch.where(pre + self.gate_bias.to(pre) > 0, magnitude.relu(), torch.zeros_like(pre))


class Scaling(Record):
    """How each activation is scaled before it is encoded, where this depends on the activation.

    Attributes:
        restores: Whether what is decoded is scaled back. An autoencoder's is, and a transcoder's is not.
    """

    def __init__(self, restores: bool = True) -> None:
        self.restores = restores

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The scaled activations, and the factor `[..., 1]` and the shift `[..., 1]` that lead back from them."""
        one = torch.ones_like(x[..., :1])
        return x, one, torch.zeros_like(one)


class UnitVariance(Scaling):
    """Takes off the mean over channels and divides by their standard deviation (Gao et al. 2024, A.1)."""

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As `Scaling`. The standard deviation divides by one channel less, and 1e-5 is added to it."""
        shift = x.mean(dim=-1, keepdim=True)
        factor = (x - shift).std(dim=-1, keepdim=True)
        return (x - shift) / (factor + 1e-5), factor, shift


class ConstantNorm(Scaling):
    """Scales each activation to a norm of the square root of its width (Conerly et al. 2024, April update)."""

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As `Scaling`."""
        factor = x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5
        return x / factor, factor, torch.zeros_like(factor)


class Dictionary(Record):
    """A sparse autoencoder or a transcoder, as it is published for one place of one model.

    `features = activation(encoder (x - input_bias) + encoder_bias)`, `decoded = features decoder + decoder_bias`
    (`+ skip x` for a skip transcoder). What was trained on activations scaled by a constant is brought to this form
    when it is read. Some are trained on activations that are each scaled by their own norm: `scaling` holds how.

    Attributes:
        encoder: `[features, width]`.
        encoder_bias: `[features]`.
        decoder: `[features, output width]`: row `i` is the direction of feature `i`.
        decoder_bias: `[output width]`.
        activation: What makes features of pre-activations.
        input_bias: `[width]`, taken from what is encoded; None if nothing is.
        skip: `[output width, width]` of a skip transcoder; None for every other dictionary.
        reads: The value that it encodes, with its layer, as in `"layers_output[12]"`; None if unknown.
        writes: The value that it decodes to; the same as `reads` for an autoencoder.
        source: Where it came from, for messages.
        scaling: How each activation is scaled before it is encoded; None if it is not.
        model_name: The model that it was trained on, as its publisher names it; None if unknown.
        prepend_bos: Whether a beginning-of-sequence token preceded the texts it was trained on; None if unknown.
        transcodes: Whether it is known to be a transcoder, also where the values that it reads and writes are unknown.
    """

    def __init__(
        self,
        encoder: torch.Tensor,
        encoder_bias: torch.Tensor,
        decoder: torch.Tensor,
        decoder_bias: torch.Tensor,
        activation: Activation,
        input_bias: torch.Tensor | None = None,
        skip: torch.Tensor | None = None,
        reads: str | None = None,
        writes: str | None = None,
        source: str = "",
        scaling: Scaling | None = None,
        model_name: str | None = None,
        prepend_bos: bool | None = None,
        transcodes: bool = False,
    ) -> None:
        self.encoder, self.encoder_bias = encoder, encoder_bias
        self.decoder, self.decoder_bias = decoder, decoder_bias
        self.activation, self.input_bias, self.skip = activation, input_bias, skip
        self.reads, self.writes, self.source = reads, writes, source
        self.scaling, self.model_name, self.prepend_bos = scaling, model_name, prepend_bos
        self.transcodes = transcodes

    def __repr__(self) -> str:
        kind = "transcoder" if self.is_transcoder else "autoencoder"
        place = f"{self.reads} -> {self.writes}" if self.is_transcoder else f"{self.reads}"
        return f"Dictionary({kind}; {place}; {self.num_features} features of width {self.width}; {self.source})"

    @property
    def num_features(self) -> int:
        """Number of features."""
        return self.encoder.shape[0]

    @property
    def width(self) -> int:
        """Width of what is encoded."""
        return self.encoder.shape[1]

    @property
    def output_width(self) -> int:
        """Width of what it decodes to."""
        return self.decoder.shape[1]

    @property
    def needs_input(self) -> bool:
        """Whether `decode` has to be given what was encoded."""
        return self.skip is not None or (self.scaling is not None and self.scaling.restores)

    @property
    def is_transcoder(self) -> bool:
        """Whether it decodes to another value than the one it encodes."""
        return self.transcodes or self.writes != self.reads

    def pre_activations(self, x: torch.Tensor) -> torch.Tensor:
        """What the activation function is given, `[..., features]`, of activations `[..., width]`.

        In the dictionary's dtype and on its device.
        """
        x = x.to(self.encoder)
        if self.scaling is not None:
            x = self.scaling(x)[0]
        if self.input_bias is not None:
            x = x - self.input_bias
        return x @ self.encoder.T + self.encoder_bias

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Features `[..., features]` of activations `[..., width]`, in the dictionary's dtype and on its device."""
        return self.activation(self.pre_activations(x))

    def decode(self, features: torch.Tensor, x: torch.Tensor | None = None) -> torch.Tensor:
        """Activations `[..., output width]` of features `[..., features]`, in the dictionary's dtype and on its device.

        Args:
            features: As `encode` returns them, or edited.
            x: What was encoded; only a skip transcoder, and one that scales back, need it (`needs_input`).

        Raises:
            ValueError: It was not given `x` and needs it.
        """
        decoded = features.to(self.decoder) @ self.decoder + self.decoder_bias
        if not self.needs_input:
            return decoded
        if x is None:
            raise ValueError("What this dictionary decodes depends on what was encoded: give decode() x as well.")
        x = x.to(self.decoder)
        if self.scaling is not None and self.scaling.restores:
            _, factor, shift = self.scaling(x)
            decoded = decoded * factor + shift
        return decoded if self.skip is None else decoded + x @ self.skip.T

    def decode_change(self, change: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """What a change of features adds to what is decoded, `[..., output width]`, without biases and skip.

        In the dictionary's dtype and on its device.


        Args:
            change: `[..., features]`.
            x: What was encoded, `[..., width]`.
        """
        decoded = change.to(self.decoder) @ self.decoder
        if self.scaling is None or not self.scaling.restores:
            return decoded
        return decoded * self.scaling(x.to(self.decoder))[1]

    def to(self, *target: torch.device | torch.dtype | str) -> Dictionary:
        """The same dictionary on a device, in a dtype, or both."""
        return _moved(self, target)


class CrossLayerTranscoder(Record):
    """Features that are read at one layer and write to that layer and to all after it (Ameisen et al. 2025, Circuit
    tracing, 2.1).

    Attributes:
        encoders: For each layer its part as a `Dictionary`: its encoder, and the decoder into the same layer, whose
            `decoder_bias` is the layer's own.
        decoders: For each layer `[features, layers from it on, output width]`.
        reads, writes: The values, without their layer; None if unknown.
        source: Where it came from, for messages.
        model_name: The model that it was trained on, as its publisher names it; None if unknown.
    """

    def __init__(
        self,
        encoders: tuple[Dictionary, ...],
        decoders: tuple[torch.Tensor, ...],
        reads: str | None = None,
        writes: str | None = None,
        source: str = "",
        model_name: str | None = None,
    ) -> None:
        self.encoders, self.decoders = encoders, decoders
        self.reads, self.writes, self.source, self.model_name = reads, writes, source, model_name

    def __repr__(self) -> str:
        features = self.encoders[0].num_features
        return f"CrossLayerTranscoder({self.num_layers} layers; {features} features each; {self.source})"

    @property
    def num_layers(self) -> int:
        """Number of layers that are read."""
        return len(self.encoders)

    def encode(self, x: torch.Tensor, layer: int) -> torch.Tensor:
        """Features `[..., features]` of activations `[..., width]` of a layer, its encoder's dtype and device."""
        return self.encoders[layer].encode(x)

    def decode(self, features: list[torch.Tensor], layer: int, x: torch.Tensor | None = None) -> torch.Tensor:
        """What is written to a layer, `[..., output width]`, in its decoder's dtype and on its device.

        Args:
            features: For each layer up to this one its features, `[..., features]`.
            layer: The layer.
            x: What was encoded at the layer; needed if it has a skip connection.

        Raises:
            ValueError: It was not given `x` and needs it, or not the features of each layer.
        """
        if len(features) <= layer:
            raise ValueError(f"Layer {layer} is written by layers 0 to {layer}; {len(features)} layers' were given.")
        total = self.encoders[layer].decode(features[layer], x)
        for source in range(layer):
            rows = self.decoders[source][:, layer - source]
            total = total + features[source].to(rows) @ rows
        return total

    def to(self, *target: torch.device | torch.dtype | str) -> CrossLayerTranscoder:
        """The same transcoder on a device, in a dtype, or both."""
        return _moved(self, target)


def _moved(value: Any, target: tuple[Any, ...]) -> Any:
    """A record with all its tensors moved; what is no tensor, record or tuple stays."""
    if isinstance(value, torch.Tensor):
        return value.to(*target)
    if type(value) is tuple:
        return tuple(_moved(item, target) for item in value)
    if isinstance(value, Record):
        moved = object.__new__(type(value))
        moved.__dict__.update({name: _moved(item, target) for name, item in value.__dict__.items()})
        return moved
    return value
