"""What nnterp knows about HuggingFace objects in general, whatever the architecture."""

from __future__ import annotations

from typing import Any


def text_config(config: Any) -> Any:
    """The config of the text decoder inside a possibly multimodal config; `config` itself if it has no parts."""
    get = getattr(config, "get_text_config", None)
    return get(decoder=True) if get is not None else config
