"""Prompts as token ids: encoded once, batched by length, given back in the user's order."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from numbers import Number
from typing import Any, Protocol, TypeAlias

import torch
from torch import nn

from nnterp.arguments import count
from nnterp.huggingface import is_encoder_decoder, text_config, uncached
from nnterp.indices import shown
from nnterp.rows import Batch, EncoderDecoderPrompt, Row, given
from nnterp.traced import Readout, Sharing


class Reader(Protocol):
    """What reading prompts needs of a model."""

    tokenizer: Any
    _module: nn.Module

    @property
    def model_class(self) -> str:
        """Name of the HuggingFace class."""
        ...

    @property
    def sharing(self) -> Sharing:
        """Which rows may share a padded batch, by their lengths."""
        ...

    @property
    def readout(self) -> Readout:
        """How hidden states become logits; holds the stream's layout."""
        ...


__all__ = ["Batch", "EncoderDecoderPrompt", "Row", "given"]

Prompt: TypeAlias = EncoderDecoderPrompt | str | Sequence[int] | torch.Tensor | Sequence[Mapping[str, str]]


def encode(model: Reader, prompts: Prompt | Sequence[Prompt]) -> list[Row]:
    """Prompts of any kind as rows of token ids.

    Args:
        model: The model whose tokenizer reads them.
        prompts: A text, token ids (list or 1-d tensor), chat messages (a list of {"role", "content"} dicts, put through
            the tokenizer's chat template; a final assistant message is continued), or a list of these; also a
            2-d tensor or an encoding with `input_ids` and `attention_mask`, whose padding is taken off.

    Raises:
        ValueError: There is no prompt, a prompt has no tokens, is longer than the model's context, or holds an id that
            the model does not have.
        TypeError: Something is none of these: bytes, floats, booleans.

    Warns:
        UserWarning: A 2-d tensor without a mask seems to hold padding, or a text begins with two BOS tokens.
    """
    return encode_each(model, as_prompts(model, prompts))


def encode_each(model: Reader, prompts: Sequence[Any], first: int = 0) -> list[Row]:
    """Several prompts, each of a kind that `encode` takes, as rows of token ids.

    Args:
        model: The model whose tokenizer reads them.
        prompts: The prompts.
        first: The number of the first one; errors count from it.

    Raises:
        ValueError, TypeError: As `encode`.
    """
    vocabulary, limit = _vocabulary(model), context_length(model)
    rows = [_row(model, prompt, vocabulary, f"Prompt {i}") for i, prompt in enumerate(prompts, first)]
    if not rows:
        raise ValueError("No prompts were given: pass a text, or a list with at least one.")
    for i, row in enumerate(rows, first):
        if not row.ids:
            raise ValueError(f"Prompt {i} ({row.text!r}) has no tokens, and a model needs at least one.")
        if limit is not None and len(row) > limit:
            raise ValueError(f"Prompt {i} has {len(row)} tokens; {model.model_class} was built for at most {limit}.")
    return rows


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


def forward_flags(model: Reader) -> dict[str, Any]:
    """Keywords for a forward pass that nothing will continue: `use_cache=False`, for models that take it."""
    return uncached(model._module)


@contextlib.contextmanager
def left_padded(tokenizer: Any) -> Iterator[None]:
    """The tokenizer's padding side set to the left inside the block: the side that the certificate proves exact."""
    side = getattr(tokenizer, "padding_side", None)
    if side is None:
        yield
        return
    tokenizer.padding_side = "left"
    try:
        yield
    finally:
        tokenizer.padding_side = side


def by_length(rows: Sequence[Row]) -> list[int]:
    """Indices of the rows, longest first, in the order given where lengths are equal."""
    return sorted(range(len(rows)), key=lambda i: (*(-length for length in rows[i].lengths), i))


def sharing_side(model: Reader, row: Row, growth: int = 0) -> tuple[int, ...]:
    """What rows that may share a batch agree in, in an encoder-decoder model for both of its inputs."""
    own, heard = row.lengths
    side = model.sharing.side(own, growth)
    return side if row.encoder is None else (*side, *model.sharing.side(heard))


def sharing_first(model: Reader, rows: Sequence[Row], order: Sequence[int], growth: int = 0) -> list[int]:
    """Of indices of rows in the order of `by_length`, the first ones whose rows may share a batch with the very first.

    Args:
        model: The model, whose `sharing` says which rows may.
        rows: The rows.
        order: Indices of some of them.
        growth: How many tokens each row will grow by in a generation.
    """
    sides = (sharing_side(model, rows[i], growth) for i in order)
    first = next(sides)
    return list(order[: 1 + sum(1 for _ in itertools.takewhile(lambda side: side == first, sides))])


def batches(model: Reader, rows: Sequence[Row], batch_size: int, growth: int = 0) -> Iterator[Batch]:
    """The rows in batches of at most `batch_size`, longest first, rows of like length together.

    A batch holds only rows that give in it what each gives alone (`model.sharing`): rows of equal length where
    HuggingFace's own forward is not exact under padding, and otherwise rows between the same thresholds.

    Args:
        model: The model.
        rows: The rows.
        batch_size: Most rows of a batch.
        growth: How many tokens will be generated after each row.

    Raises:
        ValueError: `batch_size` is not positive.
        TypeError: It is no integer.
    """
    batch_size = count(batch_size, "batch_size")
    order = by_length(rows)
    while order:
        chosen = sharing_first(model, rows, order[:batch_size], growth)
        yield pad(model, [rows[i] for i in chosen], tuple(chosen))
        order = order[len(chosen) :]


def pad(model: Reader, rows: Sequence[Row], indices: tuple[int, ...] | None = None) -> Batch:
    """One batch of these rows, in this order."""
    width = max(len(row) for row in rows)
    heard = [row.encoder for row in rows if row.encoder is not None]
    left = getattr(model.tokenizer, "padding_side", "left") == "left" and not heard and rows[0].features is None
    left = left and not is_encoder_decoder(model._module)
    filler = getattr(model.tokenizer, "pad_token_id", None) or 0
    ids = torch.full((len(rows), width), filler, dtype=torch.long, device="cpu")
    mask = torch.zeros_like(ids)
    starts = []
    for i, row in enumerate(rows):
        start = width - len(row) if left else 0
        ids[i, start : start + len(row)] = torch.tensor(row.ids, device="cpu")
        mask[i, start : start + len(row)] = 1
        starts.append(start)
    indices = tuple(range(len(rows))) if indices is None else indices
    encoder = pad(model, heard, indices) if heard else None
    return Batch(indices, tuple(rows), ids, mask, tuple(starts), encoder)


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
        if "input_ids" not in prompts:
            raise TypeError(f"An encoding holds input_ids; this one holds {', '.join(map(str, prompts)) or 'nothing'}.")
        ids = _tensor(prompts["input_ids"])
        mask = _tensor(prompts.get("attention_mask", torch.ones_like(ids)))
        ids, mask = (t.unsqueeze(0) if t.dim() == 1 else t for t in (ids, mask))
        return [row[keep.bool()] for row, keep in zip(ids, mask, strict=True)]
    if isinstance(prompts, Sequence):
        return list(prompts)
    raise TypeError(f"Prompts are texts, token ids, tensors, encodings or chats, not {type(prompts).__name__}.")


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


def _vocabulary(model: Reader) -> int | None:
    """Number of ids that a model embeds."""
    try:
        return model._module.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None


def _warn_of_padding(model: Reader, rows: list[torch.Tensor]) -> None:
    """Warn of ids without a mask that seem to be padded: padding is then read as tokens."""
    filler = getattr(model.tokenizer, "pad_token_id", None)
    padded = [i for i, row in enumerate(rows) if len(row) and filler is not None and filler in (row[0], row[-1])]
    if len(rows) > 1 and padded:
        warnings.warn(
            f"Rows {', '.join(map(str, padded[:5]))} of the token ids begin or end with the padding token ({filler}), "
            "and no attention mask was given, so padding is read as tokens. Pass the whole encoding (input_ids and "
            "attention_mask), or a list of rows without padding.",
            stacklevel=4,
        )


def _two_inputs(model: Reader, prompt: Any, vocabulary: int | None, label: str) -> Row:
    """What the encoder and the decoder of an encoder-decoder model read.

    Raises:
        ValueError: It is not known with which token the decoder starts, or what the encoder hears has another shape.
    """
    if not isinstance(prompt, EncoderDecoderPrompt):
        prompt = EncoderDecoderPrompt(prompt)
    heard = prompt.encoder
    if isinstance(heard, torch.Tensor) and heard.is_floating_point():
        encoder = Row(tuple(range(_heard_positions(model, heard, label))), features=heard)
    else:
        encoder = _row(model, heard, vocabulary, f"{label}: the encoder's input", own=True)
        if not encoder.ids:
            raise ValueError(f"{label}: the encoder's input has no tokens, and it needs at least one.")
    if not isinstance(prompt.decoder, str):
        return dataclasses.replace(_row(model, prompt.decoder, vocabulary, label, own=True), encoder=encoder)
    config = model._module.config
    stated = (text_config(config), config, getattr(model._module, "generation_config", None))
    start = next((i for c in stated if (i := getattr(c, "decoder_start_token_id", None)) is not None), None)
    if start is None:
        raise ValueError(
            f"{label}: the config of {model.model_class} does not say with which token the decoder starts; give its "
            "token ids: EncoderDecoderPrompt(text, decoder=[...])."
        )
    row = _encoded(model, prompt.decoder, add_special_tokens=False) if prompt.decoder else Row((), "", ())
    offsets = None if row.offsets is None else ((0, 0), *row.offsets)
    return Row((int(start), *row.ids), prompt.decoder, offsets, encoder)


def _heard_positions(model: Reader, features: torch.Tensor, label: str) -> int:
    """How many positions an encoder makes of the features it hears."""
    config = model._module.config
    bins, positions = getattr(config, "num_mel_bins", None), getattr(config, "max_source_positions", None)
    if positions is None or tuple(features.shape) != (bins, 2 * positions):
        raise ValueError(
            f"{label}: the features have shape {list(features.shape)}, and the encoder of {model.model_class} takes "
            f"[{bins}, {None if positions is None else 2 * positions}]: give what the processor makes of one sound."
        )
    return positions


def _row(model: Reader, prompt: Any, vocabulary: int | None, label: str, own: bool = False) -> Row:
    if not own and is_encoder_decoder(model._module):
        return _two_inputs(model, prompt, vocabulary, label)
    if _is_ids(prompt):
        return Row(token_ids(prompt, vocabulary, label))
    if _is_chat(prompt):
        return _encoded(model, _rendered(model, prompt), add_special_tokens=False)  # the template writes them itself
    if not isinstance(prompt, str):
        raise TypeError(
            f"{label} is a {type(prompt).__name__}: {prompt!r:.80}. A prompt is a text, token ids, a 1-d tensor or "
            "chat messages."
        )
    row = _encoded(model, prompt)
    begin = getattr(model.tokenizer, "bos_token_id", None)
    if begin is not None and row.ids[:2] == (begin, begin):
        warnings.warn(
            f"{label} begins with {model.tokenizer.bos_token!r}, and the tokenizer puts another in front of it. Give "
            "chat messages instead of their rendered text, or token ids.",
            stacklevel=4,
        )
    return row


def _rendered(model: Reader, messages: Sequence[Mapping[str, str]]) -> str:
    """Chat messages as the tokenizer's template writes them; a final assistant message is continued."""
    if not getattr(model.tokenizer, "chat_template", None):
        raise ValueError("Chat messages were given, but this model's tokenizer has no chat template.")
    continues = messages[-1]["role"] == "assistant"
    return model.tokenizer.apply_chat_template(
        list(messages), tokenize=False, add_generation_prompt=not continues, continue_final_message=continues
    )


def _encoded(model: Reader, text: str, **options: Any) -> Row:
    fast = getattr(model.tokenizer, "is_fast", False)
    encoded = model.tokenizer(text, **options, **({"return_offsets_mapping": True} if fast else {}))
    offsets = tuple(tuple(span) for span in encoded["offset_mapping"]) if fast else None
    return Row(tuple(encoded["input_ids"]), text, offsets)


def _is_chat(prompt: Any) -> bool:
    return (
        isinstance(prompt, Sequence) and len(prompt) > 0 and all(isinstance(m, Mapping) and "role" in m for m in prompt)
    )
