"""`Sizes`, the dimensions of a model, read from its config under any of the names that configs use."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from nnterp.anatomy._rename import RenameConfig
from nnterp.huggingface import text_config

HIDDEN_SIZE = ("hidden_size", "n_embd", "d_model", "model_dim", "dim", "embed_dim")
NUM_HEADS = (
    "num_attention_heads",
    "n_head",
    "n_heads",
    "num_heads",
    "decoder_attention_heads",
    "encoder_attention_heads",
)
NUM_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "kv_n_heads")
VOCAB_SIZE = ("vocab_size", "padded_vocab_size", "n_vocab")
HEAD_DIM = ("head_dim", "attention_head_dim", "d_kv", "kv_channels")
INTERMEDIATE_SIZE = ("intermediate_size", "n_inner", "ffn_dim", "decoder_ffn_dim", "ffn_hidden_size", "d_ff", "d_inner")


@dataclass(frozen=True)
class Sizes:
    """Dimensions of the text model. One that the config does not state is None (a Mamba has no heads).

    Attributes:
        num_layers: Layers of the residual stream.
        hidden_size: Width of the residual stream.
        vocab_size: Number of tokens the logits are over: their width, whatever the config says.
        num_heads: Query heads of an attention layer.
        num_kv_heads: Key and value heads (fewer than `num_heads` under grouped-query attention).
        head_dim: Width of one head.
        intermediate_size: Width of the feed-forward.
    """

    num_layers: int
    hidden_size: int | None
    vocab_size: int | None
    num_heads: int | None
    num_kv_heads: int | None
    head_dim: int | None
    intermediate_size: int | None

    def __str__(self) -> str:
        return ", ".join(f"{f.name} {getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) is not None)


def read_sizes(config: Any, num_layers: int, rename: RenameConfig) -> Sizes:
    """Look the dimensions up in the config. The keys of the user's `RenameConfig` come before the known ones.

    Returns:
        The sizes; None for each that the config does not state.
    """
    text = text_config(config)
    hidden = _lookup(text, rename.hidden_size_config_key, HIDDEN_SIZE)
    heads = _lookup(text, rename.attn_head_config_key, NUM_HEADS)
    if getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False):
        # Falcon and GPT-BigCode have a flag for "one key-value head". Falcon's config holds a number beside it, which
        # its attention does not use then.
        kv_heads: int | None = 1
    else:
        kv_heads = _lookup(text, None, NUM_KV_HEADS)
        kv_heads = heads if kv_heads is None else kv_heads
    head_dim = _lookup(text, None, HEAD_DIM)
    if head_dim is None and hidden and heads and not _varies(text, HEAD_DIM):
        head_dim = hidden // heads
    return Sizes(
        num_layers=num_layers,
        hidden_size=hidden,
        vocab_size=_lookup(text, rename.vocab_size_config_key, VOCAB_SIZE),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=_lookup(text, None, INTERMEDIATE_SIZE),
    )


def inner_width(feed_forwards: Iterable[Iterable[nn.Module]], hidden: int) -> int | None:
    """The width of feed-forwards, read from the shapes of their matrices.

    Args:
        feed_forwards: For each feed-forward, its modules.
        hidden: Width of the residual stream.

    Returns:
        The width between the matrices that read the stream and those that write to it; None if there are no such
        matrices, or if the feed-forwards differ.
    """
    widths = set()
    for modules in feed_forwards:
        found = [shape for module in modules if hidden in (shape := _matrix(module))]
        # A gate and the projection that it gates may share one matrix, which is then twice as wide.
        widths.add(min((sum(shape) - hidden for shape in found), default=None))
    return widths.pop() if len(widths) == 1 else None


def head_width(head: nn.Module | None) -> int | None:
    """Read off a head's shape how many logits it returns; returns None if its shape does not tell."""
    weight, stated = getattr(head, "weight", None), getattr(head, "out_features", None)
    if isinstance(weight, torch.Tensor) and weight.dim() == 2 and weight.is_floating_point():
        # Tied to an embedding of another size, a Linear still states the number that it was made with.
        return weight.shape[1] if type(head).__name__ == "Conv1D" else weight.shape[0]
    return stated if isinstance(stated, int) else None


def _matrix(module: nn.Module) -> tuple[int, ...]:
    """The two widths of a linear module, in either order; `()` for any other module."""
    if isinstance(width := getattr(module, "in_features", None), int):  # quantised linear modules have it too
        return (width, module.out_features)  # type: ignore[return-value]
    weight = getattr(module, "weight", None)
    return tuple(weight.shape) if isinstance(weight, torch.Tensor) and weight.dim() == 2 else ()


def _varies(config: Any, names: tuple[str, ...]) -> bool:
    """Whether a field has another value in another layer. Transformers then refuses to read it from the config."""
    for name in names:
        try:
            getattr(config, name, None)
        except Exception as error:
            if "per-layer" in str(error):
                return True
            raise
    return False


def _lookup(config: Any, asked: str | list[str] | int | None, known: tuple[str, ...]) -> int | None:
    """The first of the user's and then of the known fields that holds an integer, or a list of equal integers."""
    if isinstance(asked, int):
        return asked
    mine = [asked] if isinstance(asked, str) else list(asked or ())
    for name in (*mine, *known):
        try:
            value = getattr(config, name, None)
        except Exception as error:
            # transformers refuses to read a field from the config if it differs between layers.
            if "per-layer" not in str(error):
                raise
            continue
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if (
            isinstance(value, (list, tuple))
            and value
            and all(isinstance(v, int) for v in value)
            and len(set(value)) == 1
        ):
            return value[0]
    return None
