"""Decoders of encoder-decoder models: how they are read out, and which inputs are theirs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import is_fake

from nnterp.traced import Readout, TracedTransformer


class DecoderReadout(Readout):
    """A readout of a decoder: while its layers are replaced, nothing reads the encoder, whose output is then zeros."""

    def by_replay(self, module: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """Logits `[..., vocab]` of hidden states `[..., hidden]`."""
        return Readout.by_replay(self, _Decoder(module, self.layout.width), hidden)  # type: ignore[arg-type]


class _Decoder:
    """An encoder-decoder model that is called as a decoder alone, beside an encoder's output of zeros."""

    def __init__(self, module: nn.Module, width: int) -> None:
        self._module, self._width = module, width

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def __call__(self, input_ids: torch.Tensor, **options: Any) -> Any:
        heard = torch.zeros((input_ids.shape[0], 1, self._width), device=input_ids.device)
        return self._module(decoder_input_ids=input_ids, encoder_outputs=(heard,), **options)


def check_encoder_mask(model: TracedTransformer, kwargs: dict[str, Any]) -> None:
    """Refuse padding of what a run's encoder reads, if it has one, where it would change the numbers.

    Raises:
        PaddingError: It would.
    """
    mask = None if kwargs.get("decoder_input_ids") is None else kwargs.get("attention_mask")
    if model.sharing is not None and isinstance(mask, torch.Tensor) and not is_fake(mask):
        model.sharing.begin(model, None if bool(mask.all()) else mask, {}, False)
