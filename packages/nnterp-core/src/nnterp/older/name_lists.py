"""The lists of names that 1.x kept in `nnterp.rename_utils`, for libraries that read them. nnterp itself does not."""

from __future__ import annotations

import enum
from typing import Literal

IgnoreType = Literal["mlp", "attention"]

MODEL_NAMES = ["transformer", "gpt_neox", "decoder", "language_model"]


def expand_path_with_model(paths: list[str]) -> list[str]:
    """Repeat each path that begins with `model.` through every name of a backbone inside it.

    Returns:
        The paths, and then the repetitions.
    """
    inner = [path.removeprefix("model.") for path in paths if path.startswith("model.")]
    return [*paths, *(f"model.{backbone}.{path}" for backbone in MODEL_NAMES for path in inner)]


ATTENTION_NAMES = ["attn", "self_attention", "attention", "norm_attn_norm"]
LAYER_NAMES = expand_path_with_model(["h", "blocks", "model.layers"])
LN_NAMES = expand_path_with_model(
    ["final_layer_norm", "ln_f", "norm_f", "norm", "embedding_norm", "model.ln_final"],
)
LM_HEAD_NAMES = ["embed_out"]
MLP_NAMES = ["block_sparse_moe", "ffn"]
EMBED_TOKENS_NAMES = expand_path_with_model(["wte", "embed_in", "word_embeddings", "model.embed_tokens"])


def default_attn_head_config_keys() -> list[str]:
    """List the config fields with the number of attention heads; returns a new list."""
    return ["n_heads", "num_attention_heads", "n_head", "num_heads"]


def default_hidden_size_config_keys() -> list[str]:
    """List the config fields with the width of the residual stream; returns a new list."""
    return ["hidden_size", "d_model", "n_embd"]


def default_vocab_size_config_keys() -> list[str]:
    """List the config fields with the size of the vocabulary; returns a new list."""
    return ["vocab_size", "n_vocab"]


class IOType(enum.Enum):
    """Whether an accessor reads what enters a module or what leaves it."""

    INPUT = "input"
    OUTPUT = "output"
