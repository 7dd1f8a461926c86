"""Prompts of every kind as rows of token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch

from nnterp.huggingface import is_encoder_decoder, takes_images, text_config
from nnterp.inputs._batches import pad
from nnterp.inputs._kinds import as_prompts, is_pair, processed, row_of, vocabulary_of
from nnterp.inputs._rows import EncoderDecoderPrompt, Reader, Row
from nnterp.inputs._two_inputs import row_of_both
from nnterp.selectors import image_token_ids

Prompt: TypeAlias = (
    EncoderDecoderPrompt | str | Sequence[int] | torch.Tensor | Sequence[Mapping[str, str]] | Mapping[str, Any]
)


def encode(model: Reader, prompts: Prompt | Sequence[Prompt], images: bool = False) -> list[Row]:
    """Prompts of any kind as rows of token ids, with their images.

    Args:
        model: The model whose tokenizer reads them.
        prompts: A text, token ids (list or 1-d tensor), chat messages (a list of {"role", "content"} dicts, put through
            the tokenizer's chat template; a final assistant message is continued), or a list of these; also a
            2-d tensor or an encoding with `input_ids` and `attention_mask`, whose padding is taken off. A prompt with
            an image is the output of the model's processor for this prompt alone, or a pair (text, image) if the model
            was loaded with `processor=`. Of an encoder-decoder model, a text or token ids are for its encoder; an
            `EncoderDecoderPrompt` also says what its decoder reads.
        images: Whether the caller runs images; prompts with images are refused if not.

    Raises:
        ValueError: There is no prompt, a prompt has no tokens, is longer than the model's context, or holds an id that
            the model does not have.
        TypeError: Something is none of these: bytes, floats, booleans; or a prompt has an image, and the caller runs
            texts.

    Warns:
        UserWarning: A 2-d tensor without a mask seems to hold padding, or a text begins with two BOS tokens.
    """
    return encode_each(model, as_prompts(model, prompts), images=images)


def encode_each(model: Reader, prompts: Sequence[Any], first: int = 0, images: bool = False) -> list[Row]:
    """Several prompts, each of a kind that `encode` takes, as rows of token ids.

    Args:
        model: The model whose tokenizer reads them.
        prompts: The prompts.
        first: The number of the first one; errors count from it.
        images: As in `encode`.

    Raises:
        ValueError, TypeError: As `encode`.
    """
    rows = read_each(model, prompts, first)
    seen = [i for i, row in enumerate(rows) if row.images is not None]
    if seen and not images:
        raise TypeError(
            f"Prompt {first + seen[0]} has an image, and this function runs texts. Images are run by model.trace, "
            "model.collect, logit_lens, run_prompts and activation_patching."
        )
    if seen:
        model.require_images(rows[seen[0]])
    return rows


def read_each(model: Reader, prompts: Sequence[Any], first: int = 0) -> list[Row]:
    """As `encode_each` with images, but nothing of runs with images is proven.

    Raises:
        ValueError, TypeError: As `encode`.
    """
    prompts = [processed(model, prompt) if is_pair(prompt) else prompt for prompt in prompts]
    vocabulary, limit = vocabulary_of(model), context_length(model)
    read = row_of_both if is_encoder_decoder(model._module) else row_of
    rows = [read(model, prompt, vocabulary, f"Prompt {i}") for i, prompt in enumerate(prompts, first)]
    if not rows:
        raise ValueError("No prompts were given: pass a text, or a list with at least one.")
    tokens, fits = _stand_for_pixels(model), getattr(model, "require_fits", None)
    for i, row in enumerate(rows, first):
        if not row.ids:
            raise ValueError(f"Prompt {i} ({row.text!r}) has no tokens, and a model needs at least one.")
        if limit is not None and len(row) > limit:
            raise ValueError(f"Prompt {i} has {len(row)} tokens; {model.model_class} was built for at most {limit}.")
        if fits is not None:
            fits(row, f"Prompt {i}")
        if row.images is None and not tokens.isdisjoint(row.ids):
            raise ValueError(
                f"Prompt {i} holds the token of an image ({sorted(tokens.intersection(row.ids))[0]}) and no image: "
                "give the output of the model's processor, with its pixel_values."
            )
    return rows


def _stand_for_pixels(model: Reader) -> frozenset[int]:
    """The tokens in whose place a model puts an image; none for a model that takes no pixels."""
    return image_token_ids(model._module.config) if takes_images(model._module) else frozenset()


def all_images(model: Reader, rows: Sequence[Row]) -> bool:
    """Whether every one of these prompts has an image.

    Raises:
        ValueError: Some have and some have not, and the model has layers that run only with one.
    """
    number = sum(row.images is not None for row in rows)
    if 0 < number < len(rows) and model.only_with_image:
        raise ValueError(
            f"{number} of {len(rows)} prompts have an image, and {model.model_class} has layers that run only with "
            "one: run prompts with images and texts apart."
        )
    return number == len(rows)


def context_length(model: Reader) -> int | None:
    """The longest input the model was built for; None where its config does not say, or its positions stretch."""
    config = text_config(model._module.config)
    if "dynamic" in str(getattr(config, "rope_parameters", None)):
        return None
    for name in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def as_given(model: Reader, row: Row) -> Prompt:
    """A row as a prompt that `encode` reads as this row: token ids, with images an encoding, or both inputs."""
    if row.encoder is None:
        return list(row.ids) if row.images is None else pad(model, [row]).encoding
    sounds = row.encoder.sounds
    heard = list(row.encoder.ids) if sounds is None else sounds.tensors["input_features"][0]
    return EncoderDecoderPrompt(heard, list(row.ids))


def both_inputs(model: Reader, inputs: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """An invoke's inputs of an encoder-decoder model, with what the decoder reads; texts are read as prompts.

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


def tokenized(tokenizer: Any, inputs: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """An invoke's inputs with its texts as token ids, for a module without a transformers pipeline."""
    texts = [inputs[0]] if inputs and isinstance(inputs[0], str) else inputs[0] if inputs else None
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
        return inputs, kwargs
    return (dict(tokenizer(list(texts), return_tensors="pt", padding=len(texts) > 1)), *inputs[1:]), kwargs
