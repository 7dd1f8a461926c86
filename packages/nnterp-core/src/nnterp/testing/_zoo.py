"""Tiny random models of every causal language model architecture that transformers knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ._exceptions import UNAVAILABLE
from ._loud import make_loud
from ._shrink import tiny_config
from ._tokenizer import tiny_tokenizer


def unavailable_model_types() -> dict[str, str]:
    """The model types of transformers' causal-LM mapping that cannot be built tiny, each with the reason."""
    return {t: reason for t, reason in UNAVAILABLE.items() if t in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}


def model_types() -> tuple[str, ...]:
    """The model types ``tiny_model`` builds: transformers' causal-LM mapping without ``unavailable_model_types()``."""
    return tuple(t for t in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if t not in UNAVAILABLE)


def tiny_model(
    model_type: str,
    *,
    seed: int = 0,
    num_layers: int | None = None,
    dtype: torch.dtype = torch.float32,
    loud: bool = True,
    **config_overrides: Any,
) -> PreTrainedModel:
    """A tiny random model of ``model_type``, in eval mode on the CPU, with the architecture's own features on.

    The hidden size is 64 and the vocabulary that of ``tiny_tokenizer()``; heads, windows, experts, caps and scales are
    small enough to show on a prompt of a dozen tokens. The same arguments give the same weights, bit for bit, whatever
    the global random state, which is left as it was.

    Args:
        model_type: one of ``model_types()``.
        seed: of the weights.
        num_layers: depth of the stack; by default 4, or as many as it takes for every kind of layer to occur.
        dtype: of the parameters.
        loud: redraw the weights so that activations and logits are of order one and every part shows in the logits;
            otherwise keep the model's own initialisation.
        **config_overrides: fields of the configuration, set last. A field that only the text part of a composite
            configuration has is set there. ``attn_implementation`` works as in ``from_pretrained``.

    Raises:
        KeyError: ``model_type`` is not a causal LM of the installed transformers, or cannot be built; the message
            says why.
    """
    if model_type in UNAVAILABLE:
        raise KeyError(f"No tiny model of {model_type!r}: {UNAVAILABLE[model_type]}")
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise KeyError(f"{model_type!r} is not a causal LM of the installed transformers; see model_types().")
    config = tiny_config(model_type, num_layers=num_layers, **config_overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if loud:
        make_loud(model, seed)
    return model.eval()


def tiny_checkpoint(model_type: str, folder: str | Path, **kwargs: Any) -> Path:
    """Save ``tiny_model(model_type, **kwargs)`` and its tokenizer to ``folder``, as ``from_pretrained`` reads them.

    Returns:
        The folder as a ``Path``; it is created where missing.

    Raises:
        KeyError: as ``tiny_model``.
    """
    folder = Path(folder)
    model = tiny_model(model_type, **kwargs)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
