"""Images of a prompt, as the tensors of a processor's output that are not about the text."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

# Keywords of a forward that hold no image.
_OF_TEXT = frozenset({"input_ids", "attention_mask", "position_ids", "labels", "inputs_embeds", "use_cache"})
_PIXELS = ("pixel_values", "image_patches", "flattened_patches", "high_res_pixel_values", "pixel_values_videos")


@dataclass(frozen=True, eq=False)
class Images:
    """The images of one prompt.

    Attributes:
        tensors: Keyword of the model's forward → tensor, for the keywords that only images need (`pixel_values`,
            `image_grid_thw`, ...), as the model's processor returns them for this prompt alone.
        digest: SHA-256 of names, shapes, dtypes and numbers, 16 hexadecimal digits. Images are equal if it is.
    """

    tensors: Mapping[str, torch.Tensor]
    digest: str

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor]) -> Images:
        """Make the images from tensors, and compute their digest."""
        digest = hashlib.sha256()
        for name in sorted(tensors):
            tensor = tensors[name].detach().cpu()
            digest.update(f"{name} {list(tensor.shape)} {tensor.dtype};".encode())
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return cls(dict(tensors), digest.hexdigest()[:16])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Images) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def repeated(self, rows: int) -> dict[str, torch.Tensor]:
        """The tensors of `rows` copies of the prompt, concatenated along the first axis as processors do."""
        return {name: torch.cat([tensor] * rows) for name, tensor in self.tensors.items()}


def holds_images(given: Any) -> bool:
    """Whether `given` is an encoding (a mapping) that holds pixels of an image or a video."""
    return isinstance(given, Mapping) and any(given.get(name) is not None for name in _PIXELS)


def images_of(encoding: Mapping[str, Any]) -> Images | None:
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
    return Images.of(beside)
