"""Write values of many prompts to a folder while they are computed: `model.collect(..., to=folder)`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
class Job:
    """One call that writes a dataset; a subclass says how prompts are run.

    Attributes:
        model: The model.
        plan: What is read.
        folder: Where it is written.
        positions: The positions of every prompt, as `plain_positions` returns them.
        dtype: What is stored; the model's if None.
        batch_size: What the entry of a shard notes.
        size: How many prompts a shard holds.
    """

    model: Any
    plan: Plan
    folder: Path
    positions: Any
    dtype: torch.dtype | None
    batch_size: int
    size: int

    @property
    def single(self) -> bool:
        """Whether one position is stored of each prompt, without an axis."""
        return is_one_position(self.positions)

    @property
    def lists(self) -> tuple[Any, ...] | None:
        """One entry for each prompt, if positions were given so."""
        plain = self.positions
        several = isinstance(plain, tuple) and any(isinstance(p, (tuple, slice)) for p in plain)
        return plain if several and isinstance(plain, tuple) else None

    def rows(self, prompts: Sequence[Any], first: int) -> tuple[list[Row], _Chosen]:
        """Prompts as token ids, and their positions."""
        rows = encode_each(self.model, prompts, first)
        each = [self.positions] * len(rows) if self.lists is None else self.lists[first : first + len(rows)]
        chosen = [
            resolve(self.model, row, one, f"Prompt {first + i}")
            for i, (row, one) in enumerate(zip(rows, each, strict=True))
        ]
        return rows, chosen

    def run(self, rows: list[Row], chosen: _Chosen) -> Iterator[tuple[Sequence[int], dict[str, torch.Tensor]]]:
        """Run the prompts of one shard, a batch at a time.

        Yields:
            The indices of some prompts in `rows`, and what was read of them, `[prompts, (positions,) ...]`, by the
            label of each target. A prompt's own positions come first.
        """
        raise NotImplementedError

    def call(self) -> Call:
        """What the numbers depend on."""
        asked = {
            "values": ", ".join(f"{name}{list(mine) if mine else ''}" for name, mine in self.plan.layers.items()),
            "positions": "all" if self.positions is None else repr(self.positions),
            "stored dtype": "the model's" if self.dtype is None else str(self.dtype),
            "prompts_per_shard": self.size,
        }
        return Call(self.model, "collect", asked)


@dataclass(frozen=True)
class _Batches(Job):
    """Padded batches of a `StandardizedTransformer`."""

    remote: Any

    def run(self, rows: list[Row], chosen: _Chosen) -> Iterator[tuple[Sequence[int], dict[str, torch.Tensor]]]:
        """As `Job.run`."""
        front = self.model.readout.layout.extra
        for batch in batches(self.model, rows, self.batch_size):
            picked = pick(batch, chosen, self.single, front)
            taken = read_batch(self.model, self.plan, batch, picked, None, self.dtype, remote=self.remote)
            yield batch.indices, {self.plan.targets[t].label: tensor for t, tensor in taken.items()}


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
    share = rank_of(rank)
    model.prepare(remote)
    require_whole_model(model, share[1])
    given, total = prompts_of(model, prompts)
    plain = plain_positions(positions)
    plan = make_plan(model, values, layers, outputs=True)
    job = _Batches(model, plan, folder, plain, dtype, batch_size, size, remote)
    with left_padded(model.tokenizer):
        return write_shards(job, given, total, progress, share)


def write_shards(
    job: Job,
    prompts: Iterable[Any],
    total: int | None,
    progress: bool | None,
    share: tuple[int, int],
    about: Mapping[str, Any] | None = None,
) -> ActivationDataset:
    """Run a job over prompts, shard by shard; shards that are whole are not run again.

    Args:
        job: The job.
        prompts: The prompts.
        total: How many they are, if that is known.
        progress: As in `collect`.
        share: The number of this process and how many write to the folder.
        about: What the manifest also says.

    Raises:
        ValueError, FileExistsError, BlockingIOError, OSError: As `StandardizedTransformer.collect`, `to=`, says.
    """
    folder, lists, (number, world) = job.folder, job.lists, share
    if total is not None:
        per_prompt(job.positions, total)
    manifest = begin(folder, described_call(job.model, job.call(), job.plan, job.single, job.size, about or {}))
    per = {target.label: per_of(target.value, job.single, target.last) for target in job.plan.targets}
    draft: Draft | None = None
    shard = first = 0
    try:
        with (
            writing(folder, number, world),
            bar(total, "collect", progress, "prompt") as shown,
            background() as behind,
        ):
            for shard, window in enumerate(windows(prompts, job.size)):
                if lists is not None and first + len(window) > len(lists):
                    raise ValueError(f"positions has {len(lists)} lists, and there are more prompts.")
                if shard % world == number:
                    rows, chosen = job.rows(window, first)
                    if not _there(folder, shard, first, rows, chosen):
                        draft = Draft(folder, shard, first, rows, chosen, job.single, per)
                        _write(job, draft, rows, chosen, shown, behind)
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


def _write(job: Job, draft: Draft, rows: list[Row], chosen: _Chosen, shown: Any, behind: Background) -> None:
    for indices, taken in job.run(rows, chosen):
        behind.submit(_put, draft, indices, Leaving(taken))
        shown.update(len(indices))
    behind.submit(draft.finish, job.batch_size)


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
