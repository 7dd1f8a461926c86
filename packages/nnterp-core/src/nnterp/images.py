"""Images of a prompt, as the tensors of a processor's output that are not about the text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from nnterp.beside import Beside

# Keywords of a forward that hold no image.
_OF_TEXT = frozenset({"input_ids", "attention_mask", "position_ids", "labels", "inputs_embeds", "use_cache"})
_PIXELS = ("pixel_values", "image_patches", "flattened_patches", "high_res_pixel_values", "pixel_values_videos")


def holds_images(given: Any) -> bool:
    """Whether `given` is an encoding (a mapping) that holds pixels of an image or a video."""
    return isinstance(given, Mapping) and any(given.get(name) is not None for name in _PIXELS)


def images_of(encoding: Mapping[str, Any]) -> Beside | None:
    """The images in a processor's output for one prompt; None if it has no pixels.

    Raises:
        TypeError: An entry that is not about the text is no tensor.
    """
    if not holds_images(encoding):
        return None
    beside = {name: value for name, value in encoding.items() if name not in _OF_TEXT and value is not None}
    for name, value in beside.items():
        if not isinstance(value, torch.Tensor):
            raise TypeError(
                f"{name} of the encoding is a {type(value).__name__}: give a processor's output with tensors "
                '(processor(..., return_tensors="pt")).'
            )
    return Beside.of(beside)
