"""The 1.x spellings of naming: `RenameConfig`, `AttnProbFunction`, `RenamingError` and sizes read from a config."""

from __future__ import annotations

from typing import Any

from nnterp.anatomy import AttnProbFunction, RenameConfig, get_rename_dict, head_width, read_sizes
from nnterp.certificate import AttentionProbabilitiesAccessor
from nnterp.errors import RenamingError
from nnterp.huggingface import text_config as _text_config
from nnterp.older.checks import check_io, check_model_renaming, get_ignores
from nnterp.older.name_lists import (
    ATTENTION_NAMES,
    EMBED_TOKENS_NAMES,
    LAYER_NAMES,
    LM_HEAD_NAMES,
    LN_NAMES,
    MLP_NAMES,
    MODEL_NAMES,
    IgnoreType,
    IOType,
    default_attn_head_config_keys,
    default_hidden_size_config_keys,
    default_vocab_size_config_keys,
    expand_path_with_model,
)
from nnterp.traced import LayerAccessor

__all__ = [
    "ATTENTION_NAMES",
    "EMBED_TOKENS_NAMES",
    "LAYER_NAMES",
    "LM_HEAD_NAMES",
    "LN_NAMES",
    "MLP_NAMES",
    "MODEL_NAMES",
    "AttentionProbabilitiesAccessor",
    "AttnProbFunction",
    "IOType",
    "IgnoreType",
    "LayerAccessor",
    "RenameConfig",
    "RenamingError",
    "check_io",
    "check_model_renaming",
    "default_attn_head_config_keys",
    "default_hidden_size_config_keys",
    "default_vocab_size_config_keys",
    "expand_path_with_model",
    "get_hidden_size",
    "get_ignores",
    "get_num_attention_heads",
    "get_rename_dict",
    "get_vocab_size",
    "text_config",
]


def __getattr__(name: str) -> Any:
    if name == "IGNORE_MLP_MODELS":  # not above, because it imports OPT's modelling code
        from transformers import OPTForCausalLM

        return (OPTForCausalLM,)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def text_config(model: Any) -> Any:
    """Find the config of the text decoder of a (possibly multimodal) model; returns that part of the model's own
    config.
    """
    return _text_config(model.config)


def get_num_attention_heads(
    model: Any, raise_error: bool = True, rename_config: RenameConfig | None = None
) -> int | None:
    """Count the query heads of an attention layer, as the config states them; returns None if it does not.

    Raises:
        ValueError: It does not, and `raise_error` is set.
    """
    return _size(model, "num_heads", "attn_head_config_key", raise_error, rename_config)


def get_hidden_size(model: Any, raise_error: bool = True, rename_config: RenameConfig | None = None) -> int | None:
    """Read the width of the residual stream, as the config states it; returns None if it does not.

    Raises:
        ValueError: It does not, and `raise_error` is set.
    """
    return _size(model, "hidden_size", "hidden_size_config_key", raise_error, rename_config)


def get_vocab_size(model: Any, raise_error: bool = True, rename_config: RenameConfig | None = None) -> int | None:
    """Read the width of the logits from the shape of the model's head, or else from its config; returns None if neither
    tells.

    Raises:
        ValueError: Neither tells, and `raise_error` is set.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if (width := head_width(head)) is not None and (rename_config is None or not rename_config.vocab_size_config_key):
        return width
    return _size(model, "vocab_size", "vocab_size_config_key", raise_error, rename_config)


def _size(model: Any, name: str, field: str, raise_error: bool, rename_config: RenameConfig | None) -> int | None:
    found = getattr(read_sizes(model.config, 0, rename_config or RenameConfig()), name)
    if found is None and raise_error:
        raise ValueError(
            f"The config of {type(model).__name__} does not state {name}; name its field, or give the number, with "
            f"RenameConfig({field}=...)."
        )
    return found
