"""What is in a dataset's folder: its manifest, its shards, and in which of them a prompt or a row stands."""

from __future__ import annotations

import bisect
import hashlib
from collections import OrderedDict
from pathlib import Path
from typing import Any

from nnterp.arguments import path_of
from nnterp.datasets._format import numbers_of_entries
from nnterp.datasets._manifest import read_entry, read_manifest
from nnterp.datasets._shard import Shard, damaged
from nnterp.indices import integer, within

_MAPPED = 64  # shards that are mapped at the same time


class Stored:
    """The shards of a dataset, mapped when they are first needed; see `ActivationDataset`.

    Attributes:
        folder, manifest: The folder, and what its manifest says.
        entries: The shards that are there.
        layers: Value → its layers.
        complete: Whether all shards are there.
        prompts, positions: How many there are up to and with each shard, after a 0.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], entries: list[dict[str, Any]]) -> None:
        self.folder, self.manifest, self.entries = folder, manifest, entries
        self.layers = {name: tuple(value["layers"]) for name, value in manifest["values"].items()}
        self.complete: bool = manifest["complete"] and len(entries) == len(manifest["shards"])
        self.prompts = _ends([entry["prompts"] for entry in entries])
        self.positions = _ends([entry["positions"] for entry in entries])
        self._mapped: OrderedDict[int, Shard] = OrderedDict()

    @classmethod
    def open(cls, folder: str | Path, partial: bool = False) -> Stored:
        """See `ActivationDataset.open`."""
        folder = path_of(folder, "folder")
        manifest = read_manifest(folder)
        if manifest["complete"]:
            entries = [{**entry, "tensors": manifest["tensors"]} for entry in manifest["shards"]]
            absent = [entry["file"] for entry in entries if not (folder / "shards" / entry["file"]).is_file()]
            if absent and not partial:
                raise FileNotFoundError(
                    f"{folder}: {len(absent)} shards are gone ({', '.join(absent[:3])}). The same call of collect() "
                    f"writes them anew; open(folder, partial=True) reads the others."
                )
            entries = [entry for entry in entries if entry["file"] not in set(absent)]
        elif not partial:
            raise ValueError(
                f"The dataset in {folder} is not complete: {len(numbers_of_entries(folder))} shards are whole. The "
                f"same call of collect() goes on from there; open(folder, partial=True) reads what there is."
            )
        else:
            found = (read_entry(folder, number) for number in numbers_of_entries(folder))
            entries = [entry for entry in found if entry is not None]
        for entry in entries:
            path = folder / "shards" / entry["file"]
            if (size := path.stat().st_size) != entry["bytes"]:
                raise ValueError(damaged(path, f"it has {size} bytes instead of {entry['bytes']}"))
        return cls(folder, manifest, entries)

    def verify(self) -> None:
        """See `ActivationDataset.verify`."""
        wrong = []
        for entry in self.entries:
            path = self.folder / "shards" / entry["file"]
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                    wrong.append(damaged(path, "its checksum is not that of what was written"))
        if wrong:
            raise ValueError("\n".join(wrong))

    @property
    def tensors(self) -> dict[str, dict[str, Any]]:
        """For each value and layer, such as "layers_output[3]", the dtype and the shape of a stored row."""
        return self.entries[0]["tensors"] if self.entries else {}

    def ends_of(self, stored_per: str) -> list[int]:
        """How many stored rows there are up to and with each shard, after a 0."""
        return self.positions if stored_per == "position" else self.prompts

    def prompt(self, prompt: Any) -> tuple[int, int]:
        """The shard of a prompt, and the prompt's number in it.

        Raises:
            IndexError: There is no such prompt.
        """
        number = within(integer(prompt, "The number of a prompt"), self.prompts[-1], "The dataset", "prompts")
        return place(self.prompts, number)

    def about(self, prompt: Any) -> dict[str, Any]:
        """A prompt's number, text, token ids and stored positions."""
        number, inside = self.prompt(prompt)
        shard = self.shard(number)
        return {
            "prompt": self.entries[number]["first"] + inside,
            "text": shard.text(inside),
            "token_ids": shard.token_ids(inside),
            "positions": shard.positions(inside),
        }

    def shard(self, number: int) -> Shard:
        """The shard of an entry."""
        if number in self._mapped:
            self._mapped.move_to_end(number)
            return self._mapped[number]
        entry = self.entries[number]
        shard = self._mapped[number] = Shard(self.folder / "shards" / entry["file"], entry["bytes"])
        if len(self._mapped) > _MAPPED:
            self._mapped.popitem(last=False)
        return shard

    def __getstate__(self) -> dict[str, Any]:
        """What a worker process is given: it maps the files itself."""
        return {**self.__dict__, "_mapped": OrderedDict()}


def place(ends: list[int], row: int) -> tuple[int, int]:
    """The shard of a row, and the row's number in it."""
    number = bisect.bisect_right(ends, row) - 1
    return number, row - ends[number]


def _ends(counts: list[int]) -> list[int]:
    found = [0]
    for one in counts:
        found.append(found[-1] + one)
    return found
