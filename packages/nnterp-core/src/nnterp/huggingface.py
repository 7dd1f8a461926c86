"""What nnterp knows about HuggingFace objects in general, whatever the architecture."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn


def text_config(config: Any) -> Any:
    """The config of the text decoder inside a possibly multimodal config; `config` itself if it has no parts."""
    get = getattr(config, "get_text_config", None)
    return get(decoder=True) if get is not None else config


def accepts_argument(module: nn.Module, name: str) -> bool:
    """Whether a module's forward takes an argument of this name, as its own or through `**kwargs`."""
    parameters = inspect.signature(module.forward).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def uncached(module: nn.Module) -> dict[str, Any]:
    """Keywords for a forward pass that nothing will continue: `use_cache=False`, for models that take it."""
    return {"use_cache": False} if accepts_argument(module, "use_cache") else {}
