"""Prompts of encoder-decoder models, which read two inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from nnterp.beside import Beside
from nnterp.huggingface import text_config
from nnterp.inputs._kinds import encoded, row_of
from nnterp.inputs._rows import EncoderDecoderPrompt, Reader, Row


def row_of_both(model: Reader, prompt: Any, vocabulary: int | None, label: str) -> Row:
    """What the decoder of an encoder-decoder model reads, with what its encoder reads; `label` is what errors call it.

    Raises:
        TypeError: An input is of another kind.
        ValueError: It is not known with which token the decoder starts, or what the encoder hears has another shape.
    """
    if not isinstance(prompt, EncoderDecoderPrompt):
        prompt = EncoderDecoderPrompt(prompt)
    heard = prompt.encoder
    if isinstance(heard, Mapping) or isinstance(prompt.decoder, Mapping):
        raise TypeError(f"{label}: each input is a text, token ids or features, not a mapping.")
    if isinstance(heard, torch.Tensor) and heard.is_floating_point():
        positions = _positions(model, heard, label)
        encoder = Row(tuple(range(positions)), sounds=Beside.of({"input_features": heard[None]}))
    elif getattr(model._module, "main_input_name", "input_ids") == "input_features":
        raise TypeError(
            f"{label}: the encoder of {model.model_class} listens. Give it the features that its processor makes of a "
            f"sound, a float tensor [bins, frames], not {heard!r:.60}."
        )
    else:
        encoder = row_of(model, heard, vocabulary, f"{label}: the encoder's input")
        if not encoder.ids:
            raise ValueError(f"{label}: the encoder's input has no tokens, and it needs at least one.")
    if not isinstance(prompt.decoder, str):
        return dataclasses.replace(row_of(model, prompt.decoder, vocabulary, label), encoder=encoder)
    config = model._module.config
    stated = (text_config(config), config, getattr(model._module, "generation_config", None))
    start = next((i for c in stated if (i := getattr(c, "decoder_start_token_id", None)) is not None), None)
    if start is None:
        raise ValueError(
            f"{label}: the config of {model.model_class} does not say with which token the decoder starts; give its "
            "token ids: EncoderDecoderPrompt(text, decoder=[...])."
        )
    row = encoded(model, prompt.decoder, add_special_tokens=False) if prompt.decoder else Row((), "", ())
    offsets = None if row.offsets is None else ((0, 0), *row.offsets)
    return Row((int(start), *row.ids), prompt.decoder, offsets, encoder=encoder)


def _positions(model: Reader, features: torch.Tensor, label: str) -> int:
    """How many positions an encoder makes of the features it hears."""
    config = model._module.config
    bins, positions = getattr(config, "num_mel_bins", None), getattr(config, "max_source_positions", None)
    if positions is None or tuple(features.shape) != (bins, 2 * positions):
        raise ValueError(
            f"{label}: the features have shape {list(features.shape)}, and the encoder of {model.model_class} takes "
            f"[{bins}, {None if positions is None else 2 * positions}]: give what the processor makes of one sound."
        )
    return positions
