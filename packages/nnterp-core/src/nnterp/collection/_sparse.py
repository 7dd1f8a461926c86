"""Collect the largest features of each position, and nothing else of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nnterp.arguments import count
from nnterp.collection._collect import collect
from nnterp.collection._collected import Collected
from nnterp.collection._outputs import Index, label_of
from nnterp.indices import Indices
from nnterp.named_transformer import NamedTransformer
from nnterp.record import Record

if TYPE_CHECKING:
    from nnterp.inputs import Row


class Largest(Record):
    """The `k` features of each position that are furthest from 0, and their indices: `[rows, (positions,) 2 × k]`."""

    def __init__(self, k: int) -> None:
        self.k = k

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """Activations in the first half, indices in the second; exact in float32 up to 2**24 features."""
        wide = torch.float64 if features.dtype == torch.float64 or features.shape[-1] > 2**24 else torch.float32
        indices = features.abs().topk(min(self.k, features.shape[-1]), dim=-1).indices
        return torch.cat([features.gather(-1, indices).to(wide), indices.to(wide)], dim=-1)


@dataclass(frozen=True)
class SparseFeatures(Mapping[Index, tuple[torch.Tensor, torch.Tensor]]):
    """The largest features of each position of many prompts: layer, or (layer, number) → (indices, activations).

    `indices` is `[prompts, (positions,) k]` int64 and `activations` the same shape, float32 (float64 for a float64
    dictionary), largest first, by absolute value: some dictionaries have negative features (`TopK(k, signed=True)`).
    Where fewer than `k` features are active, the rest have activation 0, as has everything where a prompt has no
    position (`mask`).

    Attributes:
        collected: As `model.collect` returned it, indices and activations side by side; `save` and `load` keep it.

    Example:
        attach(model, nnterp.toy_dictionary("residual_4"))
        indices, activations = collect_features(model, prompts, k=8, positions=-1)[4]  # [prompts, 8] each
    """

    collected: Collected = field(repr=False)

    @property
    def mask(self) -> torch.Tensor | None:
        """True where a prompt has a position, bool `[prompts, positions]` on the CPU; `[prompts]` of one position."""
        return self.collected.mask

    @property
    def rows(self) -> tuple[Row, ...]:
        """The prompts as token ids."""
        return self.collected.rows

    def __getitem__(self, layer: Index) -> tuple[torch.Tensor, torch.Tensor]:
        """Indices and activations of one layer.

        Raises:
            KeyError: It was not collected.
        """
        activations, indices = self.collected["features", layer].chunk(2, dim=-1)
        return indices.long(), activations

    def __iter__(self) -> Any:
        return iter(self.collected.layers["features"])

    def __len__(self) -> int:
        return len(self.collected.layers["features"])

    def of(self, layer: Index, feature: int) -> torch.Tensor:
        """Look up one feature.

        Returns:
            Its activations, `[prompts, (positions)]`, in the dtype and on the device of all activations; 0 where it is
            not among the largest.
        """
        indices, activations = self[layer]
        return torch.where(indices == feature, activations, torch.zeros_like(activations)).sum(-1)

    def save(self, path: str | Path) -> None:
        """Write everything to `<path>.safetensors`; `SparseFeatures.load` reads it."""
        self.collected.save(path)

    @classmethod
    def load(cls, path: str | Path) -> SparseFeatures:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is damaged, or holds no features.
        """
        collected = Collected.load(path)
        if tuple(collected.layers) != ("features",):
            raise ValueError(f"{path} holds {', '.join(collected.layers)}, and not sparse features.")
        return cls(collected)


def collect_features(
    model: NamedTransformer,
    prompts: Any,
    k: int = 32,
    layers: Indices = None,
    positions: Any = None,
    batch_size: int = 16,
    device: str | torch.device = "cpu",
    progress: bool | None = None,
    remote: Any = False,
    resume: Collected | str | Path | None = None,
    at: tuple[int, int] | Sequence[tuple[int, int]] | None = None,
) -> SparseFeatures:
    """The `k` largest features of each position of many prompts, by absolute value, selected inside the trace.

    Memory grows by `k` numbers and `k` indices for each position and layer, whatever the dictionaries' sizes; the
    features of one batch are held at a time. To collect all features, use `model.collect(prompts, "features")`.

    Args:
        model: The model, with dictionaries attached (`nnterp.attach`).
        prompts, positions, batch_size, device, progress, remote, resume: As in `model.collect`.
        k: How many features of each position; all of them for a smaller dictionary.
        layers: The layers; all that a dictionary is attached to if None.
        at: Instead of layers: a dictionary's layer and number, as `attach` returned them, or a list of these.

    Returns:
        `SparseFeatures`: layer → (indices, activations), `[prompts, (positions,) k]` each, on `device`; indices are
            int64, activations float32 (float64 for a float64 dictionary).

    Raises:
        ValueError: `k` is not positive, `at` and `layers` are both given, or several dictionaries are attached to a
            layer: name them with `at`.
        Unavailable: No dictionary is attached to a layer that was asked for.
        InsideTraceError: Called inside a trace of this model.

        An error in a later batch, and an interrupt, carry what is finished as `error.partial`, which `resume` takes.

    Example:
        attach(model, nnterp.toy_dictionary("residual_4"))
        indices, activations = collect_features(model, prompts, k=16, positions=-1)[4]  # [prompts, 16] each
    """
    largest = Largest(count(k, "k"))
    options: dict[str, Any] = {"batch_size": batch_size, "device": device, "progress": progress, "remote": remote}
    if at is not None and layers is not None:
        raise ValueError(
            "collect_features() takes layers or at, which names dictionaries by layer and number; not both."
        )
    names: str | list[str] = "features"
    if at is not None:
        pairs: Any = [at] if isinstance(at, tuple) and isinstance(at[0], int) else at
        names = [label_of("features", (layer, number)) for layer, number in pairs]
    return SparseFeatures(collect(model, prompts, names, layers, positions, reduce=largest, resume=resume, **options))
