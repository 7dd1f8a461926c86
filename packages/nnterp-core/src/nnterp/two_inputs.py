"""What a trace of an encoder-decoder model is given: texts and prompts are read, ids of one input alone are refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nnterp.inputs import EncoderDecoderPrompt, Reader, encode, pad


def both_inputs(model: Reader, inputs: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """An invoke's inputs with what the decoder reads; texts are read as prompts.

    Raises:
        ValueError: Token ids were given for one of the two alone.
    """
    first = inputs[0] if inputs else None
    listed = first if isinstance(first, (list, tuple)) else [first]
    if listed and all(isinstance(one, (str, EncoderDecoderPrompt)) for one in listed):
        return (pad(model, encode(model, first)).encoding, *inputs[1:]), kwargs  # type: ignore[arg-type]
    named = {*kwargs, *(first if isinstance(first, Mapping) else ())}
    if first is not None and not named & {"decoder_input_ids", "decoder_inputs_embeds"}:
        raise ValueError(
            f"{model.model_class} reads two inputs, and was given ids of one. Trace a text for its encoder, an "
            "nnterp.EncoderDecoderPrompt, or a mapping with input_ids and decoder_input_ids. (A function that raises "
            "this does not serve encoder-decoder models.)"
        )
    return inputs, kwargs
