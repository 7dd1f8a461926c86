"""What nnterp knows about HuggingFace objects in general, whatever the architecture."""

from __future__ import annotations

import contextlib
import inspect
from typing import Any

import torch
from torch import nn

from nnterp.errors import TrainingModeError


def text_config(config: Any) -> Any:
    """The config of the text decoder inside a possibly multimodal config; `config` itself if it has no parts."""
    get = getattr(config, "get_text_config", None)
    return get(decoder=True) if get is not None else config


def is_huggingface(module: nn.Module) -> bool:
    """Whether a module is a model of transformers (or a PEFT model around one), and not a user's own."""
    return hasattr(module, "can_generate")


class Logits:
    """The output of a module that returns its logits as a bare tensor, with the attribute of HuggingFace's outputs."""

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits


def with_logits(output: Any) -> Any:
    """What a model returned, with the attribute `logits` also where it is one tensor."""
    return Logits(output) if isinstance(output, torch.Tensor) else output


def dtype_of(module: nn.Module) -> torch.dtype:
    """The dtype a model computes in: its own statement, or that of its first weights."""
    stated = getattr(module, "dtype", None)
    if isinstance(stated, torch.dtype):
        return stated
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)


def input_embedding(module: nn.Module) -> nn.Module | None:
    """The embedding that a model declares, or its first `nn.Embedding`; None if it has neither."""
    with contextlib.suppress(AttributeError, NotImplementedError):
        return module.get_input_embeddings()  # type: ignore[operator]
    return next((inner for inner in module.modules() if isinstance(inner, nn.Embedding)), None)


def is_encoder_decoder(module: nn.Module) -> bool:
    """Whether a model reads one input with an encoder, and continues another with a decoder that attends to it."""
    stated = getattr(getattr(module, "config", None), "is_encoder_decoder", False)
    return bool(stated) and "decoder_input_ids" in inspect.signature(module.forward).parameters


def accepts_argument(module: nn.Module, name: str) -> bool:
    """Whether a module's forward takes an argument of this name, as its own or through `**kwargs`."""
    parameters = inspect.signature(module.forward).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def without_full_mask(module: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a run is given, without a mask that hides nothing if the module's forward takes no mask."""
    mask = kwargs.get("attention_mask")
    if mask is None or not bool(mask.all()) or accepts_argument(module, "attention_mask"):
        return kwargs
    return {name: value for name, value in kwargs.items() if name != "attention_mask"}


def cache_argument(module: nn.Module) -> str | None:
    """What a model's forward calls its cache: `cache` from transformers 5.24 on, `past_key_values` before; or None."""
    parameters = inspect.signature(module.forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in parameters), None)


def takes_images(module: nn.Module) -> bool:
    """Whether a module's forward names an argument for pixels."""
    named = inspect.signature(module.forward).parameters
    return not {"pixel_values", "image_patches", "flattened_patches"}.isdisjoint(named)


def uncached(module: nn.Module) -> dict[str, Any]:
    """Keywords for a forward pass that nothing will continue: `use_cache=False`, for models that take it."""
    return {"use_cache": False} if accepts_argument(module, "use_cache") else {}


def require_no_dropout(module: nn.Module, name: str) -> None:
    """Raise if a model would drop units out: its numbers would be random, and no two runs of a prompt the same.

    Raises:
        TrainingModeError: Some of its modules are in training mode, and its dropout is not zero.
    """
    training = [path for path, inner in module.named_modules() if inner.training]
    if training and _drops_out(module):
        raise TrainingModeError(
            f"{name} is in training mode (at {training[0] or 'its root'}), and its dropout is not zero, so its numbers "
            "would be random. Call .eval() on the HuggingFace module first."
        )


def _drops_out(module: nn.Module) -> bool:
    """Whether a dropout is above zero: of a module, or of the config, for functions that read it from there."""
    if any(
        getattr(inner, "p", 0) > 0 for inner in module.modules() if isinstance(inner, nn.modules.dropout._DropoutNd)
    ):
        return True
    stated = vars(text_config(module.config))
    named = (value for name, value in stated.items() if "drop" in name and not isinstance(value, bool))
    return any(isinstance(value, (int, float)) and value > 0 for value in named)
