"""Read from a config what its code does to logits and which layers share keys. The certificate tests all of it."""

from __future__ import annotations

from typing import Any

from torch import nn

from nnterp.huggingface import text_config
from nnterp.traced import Chain, Lender

# Config fields whose numbers are applied to the logits after the head.
_MULTIPLIERS = ("logit_scale", "lm_head_multiplier")
_DIVISORS = ("logits_scaling",)
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


def declared_chain(config: Any) -> Chain:
    """Scale and softcap of the logits, 1 and None where the config names none."""
    text = text_config(config)
    scale = 1.0
    for name in _MULTIPLIERS:
        scale *= _number(text, name) or 1.0
    for name in _DIVISORS:
        scale /= _number(text, name) or 1.0
    return Chain(scale, next((cap for name in _SOFTCAPS if (cap := _number(text, name))), None))


def _number(config: Any, name: str) -> float | None:
    value = getattr(config, name, None)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def declared_lenders(module: nn.Module, count: int) -> list[Lender]:
    """(layer, later layers that reuse something it computes, what they reuse), for each layer with such later layers.

    Args:
        module: The HuggingFace module.
        count: Number of layers.
    """
    config = text_config(module.config)
    return [*_lent_keys(config, count), *_lent_choices(config, count)]


def _lent_keys(config: Any, count: int) -> list[Lender]:
    """Gemma 3n and 4: the last layers reuse the keys and values of the last layer of their type before them."""
    shared = getattr(config, "num_kv_shared_layers", None) or 0
    if not shared:
        return []
    types = list(getattr(config, "layer_types", None) or [""] * count)
    found: list[Lender] = []
    for kind in dict.fromkeys(types[count - shared :]):
        own = [i for i in range(count - shared) if types[i] == kind]
        if own:
            borrowers = [i for i in range(count - shared, count) if types[i] == kind]
            found.append((own[-1], borrowers, "its keys and values"))
    return found


def _lent_choices(config: Any, count: int) -> list[Lender]:
    """Sparse attention: a "shared" layer attends to the keys that the last "full" layer before it picked."""
    kinds = list(getattr(config, "indexer_types", None) or ())
    found: list[Lender] = []
    for i, kind in enumerate(kinds[:count]):
        end = next((j for j in range(i + 1, count) if kinds[j] == "full"), count)
        if kind == "full" and end > i + 1:
            found.append((i, list(range(i + 1, end)), "the keys it picks"))
    return found
