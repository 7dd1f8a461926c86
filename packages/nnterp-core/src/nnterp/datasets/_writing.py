"""Write values of many prompts to a folder while they are computed: `model.collect(..., to=folder)`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch

from nnterp.arguments import check_dtype, count, path_of
from nnterp.collection import Plan, make_plan, pick, read_batch
from nnterp.datasets._background import Background, Leaving, background
from nnterp.datasets._dataset import ActivationDataset
from nnterp.datasets._draft import Draft, described
from nnterp.datasets._format import per_of, shard_path
from nnterp.datasets._locks import writing
from nnterp.datasets._manifest import begin, described_call, merge, read_entry, withdraw
from nnterp.datasets._ranks import rank_of, require_whole_model
from nnterp.datasets._shard import Shard
from nnterp.datasets._sources import prompts_of, windows
from nnterp.defaults import plain_defaults
from nnterp.indices import Indices
from nnterp.inputs import Row, batches, encode_each, left_padded
from nnterp.named_transformer import NamedTransformer
from nnterp.positions import is_one_position, per_prompt, plain_positions, resolve
from nnterp.progress import bar, check_progress
from nnterp.resuming import Call

_Chosen: TypeAlias = list[tuple[int, ...]]  # for each prompt, the positions that are stored


@dataclass(frozen=True)
class _Job:
    """One call: what every shard of it needs."""

    model: NamedTransformer
    plan: Plan
    folder: Path
    positions: Any
    lists: tuple[Any, ...] | None  # one entry a prompt, if positions were given so
    single: bool
    batch_size: int
    dtype: torch.dtype | None
    remote: Any

    def rows(self, prompts: Sequence[Any], first: int) -> tuple[list[Row], _Chosen]:
        """Prompts as token ids, and their positions."""
        rows = encode_each(self.model, prompts, first)
        each = [self.positions] * len(rows) if self.lists is None else self.lists[first : first + len(rows)]
        chosen = [
            resolve(self.model, row, one, f"Prompt {first + i}")
            for i, (row, one) in enumerate(zip(rows, each, strict=True))
        ]
        return rows, chosen

    def write(self, draft: Draft, rows: list[Row], chosen: _Chosen, shown: Any, behind: Background) -> None:
        """Run the prompts of one shard and write what is read of them."""
        front = self.model.readout.layout.extra
        for batch in batches(self.model, rows, self.batch_size):
            picked = pick(batch, chosen, self.single, front)
            taken = read_batch(self.model, self.plan, batch, picked, None, self.dtype, remote=self.remote)
            leaving = Leaving({self.plan.targets[t].label: tensor for t, tensor in taken.items()})
            behind.submit(_put, draft, batch.indices, leaving)
            shown.update(len(batch))
        behind.submit(draft.finish, self.batch_size)


@plain_defaults()
def write_dataset(
    model: NamedTransformer,
    to: str | Path,
    prompts: Any,
    values: str | Iterable[str],
    layers: Indices = None,
    positions: Any = None,
    batch_size: int = 16,
    dtype: torch.dtype | None = None,
    progress: bool | None = None,
    remote: Any = False,
    prompts_per_shard: int = 1024,
    rank: tuple[int, int] | None = None,
) -> ActivationDataset:
    """See `StandardizedTransformer.collect`, `to=`.

    Returns:
        The dataset; if other processes have not finished their shards, what there is of it (`complete` is False).
    """
    model.require_no_trace("collect()")
    folder = path_of(to, "to")
    batch_size, size = count(batch_size, "batch_size"), count(prompts_per_shard, "prompts_per_shard")
    check_dtype(dtype)
    check_progress(progress)
    number, world = rank_of(rank)
    model.prepare(remote)
    require_whole_model(model, world)
    given, total = prompts_of(model, prompts)
    plain = plain_positions(positions)
    several = isinstance(plain, tuple) and any(isinstance(p, (tuple, slice)) for p in plain)
    lists = plain if several and isinstance(plain, tuple) else None
    if total is not None:
        per_prompt(plain, total)
    plan = make_plan(model, values, layers, outputs=True)
    single = is_one_position(plain)
    asked = {
        "values": ", ".join(f"{name}{list(mine) if mine else ''}" for name, mine in plan.layers.items()),
        "positions": "all" if plain is None else repr(plain),
        "stored dtype": "the model's" if dtype is None else str(dtype),
        "prompts_per_shard": size,
    }
    manifest = described_call(model, Call(model, "collect", asked), plan, single, size)
    manifest = begin(folder, manifest)
    per = {target.label: per_of(target.value, single, target.last) for target in plan.targets}
    job = _Job(model, plan, folder, plain, lists, single, batch_size, dtype, remote)
    draft: Draft | None = None
    shard = first = 0
    try:
        with (
            writing(folder, number, world),
            left_padded(model.tokenizer),
            bar(total, "collect", progress, "prompt") as shown,
            background() as behind,
        ):
            for shard, window in enumerate(windows(given, size)):
                if lists is not None and first + len(window) > len(lists):
                    raise ValueError(f"positions has {len(lists)} lists, and there are more prompts.")
                if shard % world == number:
                    rows, chosen = job.rows(window, first)
                    if not _there(folder, shard, first, rows, chosen):
                        draft = Draft(folder, shard, first, rows, chosen, single, per)
                        job.write(draft, rows, chosen, shown, behind)
                        first += len(window)
                        continue
                first += len(window)
                shown.update(len(window))
            behind.wait()
            if not first:
                raise ValueError("No prompts were given: pass a text, or something that holds at least one.")
    except BaseException as error:
        if draft is not None:
            draft.drop()
        with contextlib.suppress(OSError):
            withdraw(folder)
        error.add_note(f"What is whole stays in {folder}; the same call goes on from there.")
        raise
    if lists is not None and first != len(lists):
        raise ValueError(f"positions has {len(lists)} lists for {first} prompts; give one list per prompt.")
    merge(folder, manifest, first, shard + 1)
    return ActivationDataset.open(folder, partial=True)


def refuse_for_disk(device: Any, reduce: Any, max_new_tokens: Any, resume: Any, generation: Mapping[str, Any]) -> None:
    """Raise for arguments of `collect` that do not go with `to=`.

    Raises:
        ValueError: There are such arguments.
    """
    if max_new_tokens is not None or generation:
        raise ValueError(
            "collect(to=...) does not generate: how much a shard holds must be known before it is written. Generate "
            "first, and collect over the whole texts, prompts and new tokens as token ids, with positions= for the "
            "positions that predicted the new tokens; or collect without to=."
        )
    if reduce is not None:
        raise ValueError(
            "collect(to=...) stores what positions= selects, and reduces nothing. Collect without to=, which keeps "
            "only the reduced values in memory; or reduce what the dataset holds."
        )
    if resume is not None:
        raise ValueError("collect(to=...) goes on from what is in the folder; leave resume out.")
    if torch.device(device).type != "cpu":
        raise ValueError(f"collect(to=...) keeps values on the disk, not on {device}; leave device out.")


def _put(draft: Draft, indices: Sequence[int], leaving: Leaving) -> None:
    draft.put(indices, leaving.arrived())


def _there(folder: Path, number: int, first: int, rows: list[Row], chosen: _Chosen) -> bool:
    """Whether a shard is whole.

    Raises:
        ValueError: It holds other prompts, and is of another dataset; or it is damaged.
    """
    entry = read_entry(folder, number)
    if entry is None:
        return False
    shard = Shard(shard_path(folder, number), entry["bytes"])
    for name, tensor in described(rows, chosen).items():
        if not torch.equal(shard.tensor(name), tensor):
            raise ValueError(_other(folder, shard, first, rows, chosen))
    return True


def _other(folder: Path, shard: Shard, first: int, rows: list[Row], chosen: _Chosen) -> str:
    held = len(shard.token_starts) - 1
    for i, (row, mine) in enumerate(zip(rows, chosen, strict=True)):
        if i >= held:
            return f"{folder} holds a dataset that ends before prompt {first + i}. Choose another folder."
        if tuple(shard.token_ids(i).tolist()) != row.ids or shard.text(i) != row.text:
            return (
                f"{folder} holds a dataset of other prompts: its prompt {first + i} is {shard.text(i)!r:.80} (token "
                f"ids {shard.token_ids(i)[:8].tolist()}), and this call has {row.text!r:.80} (token ids "
                f"{list(row.ids[:8])}). Give the same prompts, or choose another folder."
            )
        if tuple(shard.positions(i).tolist()) != mine:
            return f"{folder} holds other positions of prompt {first + i}. Choose another folder."
    return f"{folder} holds more prompts than this call, from prompt {first + len(rows)} on. Choose another folder."
