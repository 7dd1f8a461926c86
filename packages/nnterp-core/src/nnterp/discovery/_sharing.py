"""Which rows may share a padded batch, as far as a model's config and its rotary modules tell. The certificate runs it.

What transformers' models decide for a whole batch: the factors of rotary embeddings that depend on the longest row
(see `_rotations`), and which keys are attended to where not all of them are. Those that pick keys (indexers) pick all
of a short row's, so padding is exact up to that length; in a longer batch, keys of equal score are picked by where they
stand, which padding changes. Windows and chunks are counted from each row's first token, and experts take every token
they are given (no model of transformers that is served here has a capacity), so neither is a threshold.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from nnterp.discovery._rotations import rotation_sharing
from nnterp.huggingface import text_config
from nnterp.traced import Sharing

# Config fields with the number of keys that a query attends to: DeepSeek-V3.2 and its kin, Doge. Qwen 4 picks blocks
# that are counted from each row's first token, which padding does not change.
_PICKED = ("index_topk", "keep_window_size")


def declared_sharing(module: nn.Module) -> Sharing:
    """Which rows may share a batch by a model's config and rotary embeddings."""
    rotations, picked = rotation_sharing(module), picked_keys(text_config(module.config))
    limits = [limit for limit in (rotations.limit, picked) if limit is not None]
    return Sharing(min(limits, default=None), rotations.switches)


def picked_keys(config: Any) -> int | None:
    """The longest input of which every key is attended to; None where no keys are picked."""
    picked = [_number(config, name) for name in _PICKED]
    blocks, size = _number(config, "index_topk_blocks"), _number(config, "index_block_size")
    if blocks and size:  # MiniMax-M3 picks blocks of keys
        picked.append(blocks * size)
    if getattr(config, "attention_type", None) == "block_sparse":  # BigBird attends to everything in a short input
        picked.append((5 + 2 * config.num_random_blocks) * config.block_size)
    return min((number for number in picked if number), default=None)


def _number(config: Any, name: str) -> int | None:
    value = getattr(config, name, None)
    return value if isinstance(value, int) and not isinstance(value, bool) else None
