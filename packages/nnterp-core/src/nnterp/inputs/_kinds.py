"""What users give as a prompt: told apart, checked, and read one at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Number
from typing import Any

import torch

from nnterp.huggingface import is_encoder_decoder
from nnterp.images import holds_images, images_of
from nnterp.indices import shown
from nnterp.inputs._rows import EncoderDecoderPrompt, Reader, Row
from nnterp.warn import warn


def as_prompts(model: Reader, prompts: Any) -> list[Any]:
    """What `encode` takes as a list with one entry a prompt.

    Raises:
        TypeError: It is no prompt.
    """
    if isinstance(prompts, (str, EncoderDecoderPrompt)) or _is_chat(prompts) or _is_ids(prompts):
        return [prompts]
    if isinstance(prompts, (bytes, bytearray)):
        raise TypeError(f"A prompt is a text, not bytes: decode {bytes(prompts)!r:.80} first.")
    if _is_array(prompts):
        if prompts.ndim != 2:
            raise TypeError(f"Token ids have one axis, or two for several prompts; these are {shown(prompts)}.")
        rows = list(_tensor(prompts))
        _warn_of_padding(model, rows)
        return rows
    if isinstance(prompts, Mapping):
        if is_encoder_decoder(model._module):
            raise TypeError("Prompts of an encoder-decoder model are texts for its encoder, or EncoderDecoderPrompts.")
        rows = _rows_of(prompts)
        if not holds_images(prompts):
            return rows
        if len(rows) > 1:
            raise ValueError(
                f"An encoding of {len(rows)} prompts with images cannot be taken apart: give a list with the "
                "processor's output for each prompt."
            )
        return [prompts]
    if is_pair(prompts):
        return [prompts]
    if isinstance(prompts, Sequence):
        return list(prompts)
    raise TypeError(f"Prompts are texts, token ids, tensors, encodings or chats, not {type(prompts).__name__}.")


def _rows_of(encoding: Mapping[str, Any]) -> list[torch.Tensor]:
    """The token ids of each prompt of an encoding, without padding."""
    if "input_ids" not in encoding:
        raise TypeError(f"An encoding holds input_ids; this one holds {', '.join(map(str, encoding)) or 'nothing'}.")
    ids = _tensor(encoding["input_ids"])
    mask = _tensor(encoding.get("attention_mask", torch.ones_like(ids)))
    ids, mask = (t.unsqueeze(0) if t.dim() == 1 else t for t in (ids, mask))
    _refuse_places(encoding, mask)
    return [row[keep.bool()] for row, keep in zip(ids, mask, strict=True)]


def _refuse_places(encoding: Mapping[str, Any], mask: torch.Tensor) -> None:
    """Refuse embeddings, and positions other than those that tokens have by themselves: what reads ids runs neither."""
    told = "would not be used here: leave it out, or give the encoding to model.trace, which passes it on."
    if encoding.get("inputs_embeds") is not None:
        raise ValueError(f"inputs_embeds of the encoding {told}")
    if encoding.get("position_ids") is None:
        return
    places, keep, own = _tensor(encoding["position_ids"]), mask.bool(), mask.long().cumsum(-1) - 1
    places = places.unsqueeze(0) if places.dim() == 1 else places
    fits = tuple(places.shape) in ((1, own.shape[1]), tuple(own.shape))
    if not fits or not torch.equal(places.to(own).expand_as(own)[keep], own[keep]):
        raise ValueError(
            f"position_ids of the encoding are not 0, 1, 2, ... from each prompt's first token, and {told}"
        )


def without_places(encoding: Mapping[str, Any]) -> dict[str, Any]:
    """An encoding without the entries that say where its tokens stand, or what they are embedded as."""
    return {name: value for name, value in encoding.items() if name not in ("position_ids", "inputs_embeds")}


def is_pair(prompt: Any) -> bool:
    """Whether a prompt is a text with one image or several, and no list of texts, ids or messages."""
    if not isinstance(prompt, tuple) or len(prompt) != 2 or not isinstance(prompt[0], str):
        return False
    return not isinstance(prompt[1], (str, bytes, int, Mapping))


def processed(model: Reader, pair: tuple[str, Any]) -> Mapping[str, Any]:
    """A text and its images as the model's processor gives them."""
    processor = getattr(model, "processor", None)
    if processor is None:
        raise ValueError(
            "A prompt of a text and an image needs the model's processor: load the model with processor=... (such as "
            "AutoProcessor.from_pretrained(name)), or give the processor's output."
        )
    text, images = pair
    return processor(text=text, images=images, return_tensors="pt")


def _is_array(prompt: Any) -> bool:
    """Whether a prompt is a tensor or a NumPy array."""
    return isinstance(prompt, torch.Tensor) or (hasattr(prompt, "__array__") and hasattr(prompt, "ndim"))


def _tensor(values: Any) -> torch.Tensor:
    return values if isinstance(values, torch.Tensor) else torch.as_tensor(values, device="cpu")


def _is_ids(prompt: Any) -> bool:
    """Whether a prompt is one row of numbers; whether these are token ids, `token_ids` says."""
    if _is_array(prompt):
        return prompt.ndim == 1
    if isinstance(prompt, (str, bytes, bytearray)) or not isinstance(prompt, Sequence):
        return False
    return len(prompt) > 0 and all(isinstance(i, Number) for i in prompt)


def token_ids(values: Any, vocabulary: int | None, label: str) -> tuple[int, ...]:
    """Token ids of one row, from integers, or a 1-d tensor or array of them.

    Args:
        values: The row.
        vocabulary: Number of ids that the model embeds, where it is known.
        label: How errors call the row.

    Raises:
        TypeError: Something is no integer: a float, a boolean, a complex number.
        ValueError: An id is negative, or the model has no such id.
    """
    if _is_array(values):
        tensor = _tensor(values)
        if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
            raise TypeError(f"{label}: token ids are integers, and this is a tensor of {tensor.dtype}.")
        found = tensor.tolist()
    else:
        for value in values:
            if isinstance(value, bool) or not hasattr(value, "__index__"):
                raise TypeError(f"{label}: a token id is an integer, not {value!r}.")
        found = [value.__index__() for value in values]
    for value in found:
        if value < 0 or (vocabulary is not None and value >= vocabulary):
            have = "they begin at 0" if vocabulary is None else f"this model has ids from 0 to {vocabulary - 1}"
            raise ValueError(f"{label} holds the token id {value}; {have}.")
    return tuple(found)


def vocabulary_of(model: Reader) -> int | None:
    """Number of ids that a model embeds."""
    try:
        return model._module.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return getattr(model, "vocabulary", None)


def _warn_of_padding(model: Reader, rows: list[torch.Tensor]) -> None:
    """Warn of ids without a mask that seem to be padded: padding is then read as tokens."""
    filler = getattr(model.tokenizer, "pad_token_id", None)
    padded = [i for i, row in enumerate(rows) if len(row) and filler is not None and filler in (row[0], row[-1])]
    if len(rows) > 1 and padded:
        warn(
            f"Rows {', '.join(map(str, padded[:5]))} of the token ids begin or end with the padding token ({filler}), "
            "and no attention mask was given, so padding is read as tokens. Pass the whole encoding (input_ids and "
            "attention_mask), or a list of rows without padding."
        )


def row_of(model: Reader, prompt: Any, vocabulary: int | None, label: str) -> Row:
    """One prompt of one input as a row; `label` is what errors call it."""
    if isinstance(prompt, Mapping):
        return _with_images(model, prompt, vocabulary, label)
    if _is_ids(prompt):
        return Row(token_ids(prompt, vocabulary, label))
    if _is_chat(prompt):
        return encoded(model, _rendered(model, prompt), add_special_tokens=False)  # the template writes them itself
    if not isinstance(prompt, str):
        raise TypeError(
            f"{label} is a {type(prompt).__name__}: {prompt!r:.80}. A prompt is a text, token ids, a 1-d tensor or "
            "chat messages."
        )
    row = encoded(model, prompt)
    begin = getattr(model.tokenizer, "bos_token_id", None)
    if begin is not None and row.ids[:2] == (begin, begin):
        warn(
            f"{label} begins with {model.tokenizer.bos_token!r}, and the tokenizer puts another in front of it. Give "
            "chat messages instead of their rendered text, or token ids."
        )
    return row


def _with_images(model: Reader, encoding: Mapping[str, Any], vocabulary: int | None, label: str) -> Row:
    """One prompt from a processor's output."""
    rows = _rows_of(encoding)
    if len(rows) != 1:
        raise ValueError(f"{label} is an encoding of {len(rows)} prompts; in a list, give one for each prompt.")
    images = images_of(encoding)
    width = _tensor(encoding["input_ids"]).shape[-1]
    if images is not None and len(rows[0]) != width:
        raise ValueError(
            f"{label} has an image and {width - len(rows[0])} tokens of padding: give the processor's output for this "
            "prompt alone, without padding."
        )
    return Row(token_ids(rows[0], vocabulary, label), images=images)


def _rendered(model: Reader, messages: Sequence[Mapping[str, str]]) -> str:
    """Chat messages as the tokenizer's template writes them; a final assistant message is continued."""
    if not getattr(model.tokenizer, "chat_template", None):
        raise ValueError("Chat messages were given, but this model's tokenizer has no chat template.")
    continues = messages[-1]["role"] == "assistant"
    return model.tokenizer.apply_chat_template(
        list(messages), tokenize=False, add_generation_prompt=not continues, continue_final_message=continues
    )


def encoded(model: Reader, text: str, **options: Any) -> Row:
    """A text as the model's tokenizer reads it."""
    fast = getattr(model.tokenizer, "is_fast", False)
    read = model.tokenizer(text, **options, **({"return_offsets_mapping": True} if fast else {}))
    offsets = tuple(tuple(span) for span in read["offset_mapping"]) if fast else None
    return Row(tuple(read["input_ids"]), text, offsets)


def _is_chat(prompt: Any) -> bool:
    return (
        isinstance(prompt, Sequence) and len(prompt) > 0 and all(isinstance(m, Mapping) and "role" in m for m in prompt)
    )
