"""A dictionary: an encoder of activations into sparse features, and a decoder of features into activations."""

from __future__ import annotations

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
    """

    def __init__(self, k: int) -> None:
        self.k = k

    def __call__(self, pre: torch.Tensor) -> torch.Tensor:
        """Features, in the shape of `pre`."""
        largest = pre.topk(self.k, dim=-1)
        return torch.zeros_like(pre).scatter(-1, largest.indices, largest.values.relu())


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


class Dictionary(Record):
    """A sparse autoencoder or a transcoder, as it is published for one place of one model.

    `features = activation(encoder (x - input_bias) + encoder_bias)`, `decoded = features decoder + decoder_bias`
    (`+ skip x` for a skip transcoder). What was trained on scaled activations is brought to this form when it is read.

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
    ) -> None:
        self.encoder, self.encoder_bias = encoder, encoder_bias
        self.decoder, self.decoder_bias = decoder, decoder_bias
        self.activation, self.input_bias, self.skip = activation, input_bias, skip
        self.reads, self.writes, self.source = reads, writes, source

    @property
    def num_features(self) -> int:
        """Number of features."""
        return self.encoder.shape[0]

    @property
    def width(self) -> int:
        """Width of what is encoded."""
        return self.encoder.shape[1]

    @property
    def is_transcoder(self) -> bool:
        """Whether it decodes to another value than the one it encodes."""
        return self.writes != self.reads

    def pre_activations(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., features]` of activations `[..., width]`: what the activation function is given."""
        x = x.to(self.encoder)
        if self.input_bias is not None:
            x = x - self.input_bias
        return x @ self.encoder.T + self.encoder_bias

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Features `[..., features]` of activations `[..., width]`, in the dictionary's dtype and on its device."""
        return self.activation(self.pre_activations(x))

    def decode(self, features: torch.Tensor, x: torch.Tensor | None = None) -> torch.Tensor:
        """Activations `[..., output width]` of features `[..., features]`.

        Args:
            features: As `encode` returns them, or edited.
            x: What was encoded; only a skip transcoder needs it.

        Raises:
            ValueError: A skip transcoder was not given `x`.
        """
        decoded = features.to(self.decoder) @ self.decoder + self.decoder_bias
        if self.skip is None:
            return decoded
        if x is None:
            raise ValueError("A skip transcoder adds a linear map of what was encoded: give decode() x as well.")
        return decoded + x.to(self.skip) @ self.skip.T

    def decode_change(self, change: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """What a change of features adds to what is decoded, `[..., output width]`; the biases take no part.

        Args:
            change: `[..., features]`.
            x: What was encoded.
        """
        return change.to(self.decoder) @ self.decoder
