"""Decoders of encoder-decoder models: how they are read out, and which inputs are theirs."""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import is_fake

from nnterp.traced import Readout, TracedTransformer


class DecoderReadout(Readout):
    """A readout of a decoder: while its layers are replaced, nothing reads the encoder, whose output is then zeros."""

    def replayed(self, ids: torch.Tensor) -> dict[str, Any]:
        """What the model is given while its layers are replaced."""
        nothing = torch.zeros((ids.shape[0], 1, self.layout.width), device=ids.device)
        return {"decoder_input_ids": ids, "encoder_outputs": (nothing,)}


def stream_inputs(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Of what a run is given, the inputs of the residual stream: a decoder's under the names that other models use."""
    if kwargs.get("decoder_input_ids") is None:
        return kwargs
    return {name.removeprefix("decoder_"): value for name, value in kwargs.items() if name.startswith("decoder_")}


def check_encoder_mask(model: TracedTransformer, kwargs: dict[str, Any]) -> None:
    """Refuse padding of what a run's encoder reads, if it has one, where it would change the numbers.

    Raises:
        PaddingError: It would.
    """
    mask = None if kwargs.get("decoder_input_ids") is None else kwargs.get("attention_mask")
    if model.sharing is not None and isinstance(mask, torch.Tensor) and not is_fake(mask):
        model.sharing.begin(model, None if bool(mask.all()) else mask, {}, False)
