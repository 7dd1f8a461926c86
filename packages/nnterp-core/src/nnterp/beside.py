"""Tensors that a model's forward is given beside a prompt's token ids: images, or the sounds that an encoder hears."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class Beside:
    """What one prompt has beside its token ids.

    Attributes:
        tensors: Keyword of the model's forward → tensor (`pixel_values`, `image_grid_thw`, `input_features`, ...), as
            the model's processor returns them for this prompt alone.
        digest: SHA-256 of names, shapes, dtypes and numbers, 16 hexadecimal digits. Two are equal if it is.
    """

    tensors: Mapping[str, torch.Tensor]
    digest: str

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor]) -> Beside:
        """Keep these tensors, and compute their digest."""
        digest = hashlib.sha256()
        for name in sorted(tensors):
            tensor = tensors[name].detach().cpu()
            digest.update(f"{name} {list(tensor.shape)} {tensor.dtype};".encode())
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return cls(dict(tensors), digest.hexdigest()[:16])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Beside) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)


def stacked(given: Sequence[Beside | None]) -> dict[str, torch.Tensor]:
    """The tensors of a batch of prompts, concatenated along the first axis as processors do; empty if they have none.

    Raises:
        ValueError: Some have and some have not.
    """
    held = [one.tensors for one in given if one is not None]
    if held and len(held) < len(given):
        raise ValueError(f"{len(held)} of {len(given)} prompts of a batch have images or sounds: run them apart.")
    return {name: torch.cat([tensors[name] for tensors in held]) for name in (held[0] if held else ())}
