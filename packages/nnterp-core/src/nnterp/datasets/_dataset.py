"""Activations on disk: read by value, layer, prompt and token without loading more than what is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from nnterp.collection import read_key
from nnterp.datasets._column import ActivationColumn
from nnterp.datasets._format import label
from nnterp.datasets._huggingface import to_huggingface
from nnterp.datasets._stored import Stored


class ActivationDataset(torch.utils.data.Dataset):
    """Values of many prompts in a folder, as `model.collect(..., to=folder)` writes them; open one with `open`.

    It is a map-style `torch.utils.data.Dataset` over prompts: `dataset[i]` is all that is stored of prompt `i`. The
    rows of one value, `dataset["layers_output", 3]`, are a dataset of their own; see `ActivationColumn`. Files are
    mapped into memory: only what is read is loaded. Tensors are copies on the CPU, in the dtype that is
    stored.

    Attributes:
        folder: Where it is.
        manifest: What `manifest.json` says: values, layers, positions, shapes, dtypes, model, revision, certificate,
            tokenizer, versions, and the checksum of each shard.
        layers: Value → its layers, in the order asked for; empty for a value that is not per layer.
        num_layers: Layers of the model.
        complete: Whether all shards are there.

    Example:
        dataset = model.collect(prompts, "layers_output", positions=-1, to="activations")
        print(len(dataset), list(dataset["layers_output", 3][0].shape))  # → 2 [128]
    """

    def __init__(self, stored: Stored) -> None:
        self._stored = stored
        self.folder, self.manifest, self.layers = stored.folder, stored.manifest, stored.layers
        self.num_layers: int = stored.manifest["model"]["num_layers"]
        self.complete = stored.complete

    @classmethod
    def open(cls, folder: str | Path, partial: bool = False) -> ActivationDataset:
        """Open the dataset in a folder.

        Args:
            folder: The folder.
            partial: Also open a dataset that is not complete: the prompts of the shards that are whole, one after the
                other; `dataset[i]["prompt"]` says which they are.

        Raises:
            FileNotFoundError: There is no dataset, or one of its shards is gone.
            ValueError: It is not complete, and `partial` is False; or the manifest or a shard is damaged.

        Example:
            model.collect(prompts, "layers_output", positions=-1, to="activations")
            dataset = nnterp.ActivationDataset.open("activations")
            state = dataset["layers_output", 3][0]  # [hidden]
        """
        return cls(Stored.open(folder, partial))

    def verify(self) -> None:
        """Read everything, and compare it with the checksums.

        Raises:
            ValueError: A shard is damaged; names each.
        """
        self._stored.verify()

    def __len__(self) -> int:
        """Number of prompts."""
        return self._stored.prompts[-1]

    def __getitem__(self, key: Any) -> Any:
        """A value's rows, or all of one prompt.

        Args:
            key: A value, `"layers_output"`, with a layer, `("layers_output", 3)`, in any spelling that `collect` takes;
                or the number of a prompt, negative from the end.

        Returns:
            For a value, its `ActivationColumn`. For a prompt, a dict: "prompt", its number; "text"; "token_ids",
            `[tokens]`; "positions", those that are stored; and each value, `[layers, (positions,) ...]`, or one entry
            for each layer, such as "mlp_neurons[3]", where the shapes of layers differ.

        Raises:
            KeyError: The value, or this layer of it, is not in the dataset.
            IndexError: There is no such prompt.
        """
        if isinstance(key, (str, tuple)):
            name, layer = read_key(key, self.layers, self.num_layers, "collected")
            return ActivationColumn(self._stored, name, self.layers[name] if layer is None else (layer,), layer is None)
        found = self._stored.about(key)
        for name, layers in self.layers.items():
            if len({str(self.tensors[label(name, layer)]) for layer in layers}) > 1:
                found |= {label(name, layer): self[name, layer].prompt(key) for layer in dict.fromkeys(layers)}
            else:
                found[name] = self[name].prompt(key)
        return found

    def __getitems__(self, prompts: list[int]) -> list[dict[str, Any]]:
        """Several prompts; torch's DataLoader asks so."""
        return [self[prompt] for prompt in prompts]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """All prompts, in order."""
        return (self[prompt] for prompt in range(len(self)))

    @property
    def values(self) -> tuple[str, ...]:
        """The values that are stored."""
        return tuple(self.layers)

    @property
    def tensors(self) -> dict[str, dict[str, Any]]:
        """For each value and layer, such as "layers_output[3]", the dtype and the shape of a stored row."""
        return self._stored.tensors

    def huggingface(self) -> Any:
        """Copy the dataset to the cache of `datasets` (not to memory).

        Its columns are prompt, text, token_ids, positions, and one for each value and layer, "layers_output[3]", as
        nested lists. bfloat16 becomes float32, which is exact, because Arrow has no bfloat16.

        Returns:
            A `datasets.Dataset`, one row a prompt.

        Raises:
            ImportError: The package `datasets` is not installed.
            ValueError: The dataset is not complete.
        """
        return to_huggingface(self._stored)

    def __repr__(self) -> str:
        lines = []
        for name, layers in self.layers.items():
            about = self.tensors.get(label(name, layers[0] if layers else None), {})
            of = f" of {len(layers)} layers" if layers else ""
            lines.append(f"  {name}{of}: {self[name].rows} rows of {about.get('shape')}, {about.get('dtype')}")
        state = "" if self.complete else ", not complete"
        return "\n".join([f"ActivationDataset({str(self.folder)!r}, {len(self)} prompts{state})", *lines])
