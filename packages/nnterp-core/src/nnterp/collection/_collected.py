"""What `collect` gives back: plain tensors by value, by layer, or by TransformerLens name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch

from nnterp.collection._keys import read_key
from nnterp.collection._outputs import Index, label_of
from nnterp.files import read_tensors, write_tensors
from nnterp.inputs import Row

# All layers of a value in one tensor, or layer → tensor where their shapes differ.
Tensors: TypeAlias = torch.Tensor | dict[Index, torch.Tensor]


@dataclass(frozen=True)
class Collected(Mapping[str, torch.Tensor]):
    """Values of many prompts.

    `collected["layers_output"]` is `[layers, prompts, ...]`, prompts in the order they were given; a value that is not
    per layer is `[prompts, ...]`. `collected["layers_output", 3]`, `collected["layers_output[3]"]` and
    `collected["blocks.3.hook_resid_post"]` are the same tensor of one layer, `[prompts, ...]`.

    After the prompts comes one axis for the positions, unless one position was asked for. Where prompts have different
    numbers of positions, the axis is as long as the longest, a prompt's own come first, the rest is zero, and `mask`
    says which are which. Attention patterns are `[layers, prompts, heads, positions, keys]`: keys are counted over the
    prompt's own tokens as well, zero beyond them.

    Attributes:
        layers: Value → the layers in its first axis, in the order asked for, duplicates kept; empty for a value that is
            not per layer.
        positions: For each prompt, the positions that were read, counted over its own tokens.
        mask: True where a prompt has a position, `[prompts, positions]`; `[prompts]` if one position was asked for;
            None if all prompts were reduced to one result.
        rows: The prompts as token ids.
        generated: For a generation, the new token ids, `[prompts, tokens]`; `positions` are then those that predicted
            them.
        done: Which prompts are filled in; all, unless the run was cut short (see `collect`).
        sums: Value, with its layer → what "mean" and "sum" have added up so far, if the run was cut short.
        run: What the run depended on, if it was cut short: `collect(..., resume=...)` compares it.
    """

    tensors: dict[str, Tensors]
    layers: dict[str, tuple[Index, ...]]
    positions: tuple[tuple[int, ...], ...]
    mask: torch.Tensor | None
    rows: tuple[Row, ...] = field(repr=False)
    generated: torch.Tensor | None = None
    done: set[int] = field(default_factory=set, repr=False)
    num_layers: int = 0
    sums: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)
    run: dict[str, Any] | None = field(default=None, repr=False)

    def __getitem__(self, key: str | tuple[str, Index]) -> torch.Tensor:
        """A value's tensor; see the class.

        Raises:
            KeyError: The value, or the layer of it, was not collected.
            TypeError: The layer is no integer.
            ValueError: The layers of this value differ in shape, so there is no one tensor: ask for one layer.
        """
        name, layer = read_key(key, self.layers, self.num_layers, "collected")
        tensor = self.tensors[name]
        if layer is not None:
            return tensor[layer] if isinstance(tensor, dict) else tensor[self.layers[name].index(layer)]
        if isinstance(tensor, dict):
            raise ValueError(
                f"The layers of {name} differ in shape ({self.shapes(name)}), so they make no one tensor; ask for "
                f"one: collected[{name!r}, {self.layers[name][0]}]."
            )
        return tensor

    def part(self, label: str) -> torch.Tensor:
        """Look up one layer of a value, "layers_output[3]", or a value that is not per layer, "logits"; returns
        `collected[label]`.

        Returns:
            The tensor, as `collected[label]`, in its dtype, on its device.
        """
        return self[label]

    def save(self, path: str | Path) -> None:
        """Write everything to `<path>.safetensors`: tensors, mask, positions and prompts. `Collected.load` reads it.

        A save that fails or is killed leaves an earlier file as it was.

        Raises:
            FileExistsError: The file exists and holds nothing collected; it is not overwritten.
            OSError: It cannot be written.
        """
        contents: dict[str, torch.Tensor] = {}
        for name, tensor in self.tensors.items():
            if isinstance(tensor, torch.Tensor):
                contents[name] = tensor
            else:
                contents.update({label_of(name, layer): part for layer, part in tensor.items()})
        contents |= {name: t for name in ("mask", "generated") if (t := getattr(self, name)) is not None}
        contents |= {f"sum of {label}": total for label, total in self.sums.items()}
        record = {
            "run": self.run,
            "layers": self.layers,
            "positions": self.positions,
            "rows": [[row.ids, row.text, row.offsets] for row in self.rows],
            "done": sorted(self.done),
            "num_layers": self.num_layers,
        }
        write_tensors(path, contents, record, "collected")

    @classmethod
    def load(cls, path: str | Path) -> Collected:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is truncated, damaged, or holds something else; names the file.
        """
        stored, record = read_tensors(path, "collected")
        layers: dict[str, tuple[Index, ...]] = {
            name: tuple((one[0], one[1]) if isinstance(one, list) else one for one in mine)
            for name, mine in record["layers"].items()
        }
        tensors: dict[str, Tensors] = {
            name: stored[name] if name in stored else {layer: stored[label_of(name, layer)] for layer in mine}
            for name, mine in layers.items()
        }
        rows = tuple(
            Row(tuple(ids), text, None if spans is None else tuple((a, b) for a, b in spans))
            for ids, text, spans in record["rows"]
        )
        positions = tuple(tuple(mine) for mine in record["positions"])
        mask, generated = stored.get("mask"), stored.get("generated")
        sums = {name.removeprefix("sum of "): total for name, total in stored.items() if name.startswith("sum of ")}
        done, num_layers = set(record["done"]), record["num_layers"]
        return cls(tensors, layers, positions, mask, rows, generated, done, num_layers, sums, record.get("run"))

    def __contains__(self, key: object) -> bool:
        try:
            read_key(key, self.layers, self.num_layers, "collected")
        except (KeyError, TypeError):
            return False
        return True

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def shapes(self, name: str) -> str:
        """Write the shape of a value as text.

        Returns:
            The shape, or those of its layers where they differ.
        """
        tensor = self.tensors[name]
        if isinstance(tensor, torch.Tensor):
            return str(list(tensor.shape))
        return ", ".join(dict.fromkeys(str(list(t.shape)) for t in tensor.values()))

    def __repr__(self) -> str:
        lines = [f"  {name}: {self.shapes(name)}" for name in self.tensors]
        return "\n".join([f"Collected({len(self.rows)} prompts)", *lines])
