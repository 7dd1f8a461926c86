"""Run a function of this package over many prompts in shards, in one or several processes, and merge the results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nnterp.arguments import count, path_of
from nnterp.datasets import rank_of, require_whole_model
from nnterp.interventions._results import Result
from nnterp.progress import bar, check_progress
from nnterp.resuming import Call, differing

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer

SHARD = "shard"  # the entry of a stored result's `about` that says which shard it is
_PROMPTS = "prompts"
_BY_PROMPT = ("clean", "corrupted")  # entries of `about` that have one item for each prompt


def run_shards(
    model: StandardizedTransformer,
    work: Callable[[range], Result],
    prompts: int,
    to: str | Path,
    *,
    prompts_per_shard: int = 16,
    rank: tuple[int, int] | None = None,
    progress: bool | None = None,
) -> Result | None:
    """Call `work` once for every `prompts_per_shard` prompts and save each result; several processes share the calls.

    Start the same program in every process. Process r of n computes the shards r, r + n, r + 2n and so on. A shard is
    one file, which is written when its result is complete. Processes do not communicate; they only need a folder that
    all of them can write. A shard that exists is not computed again: if a program was killed, start it again, with any
    number of processes. Only the shards that it was working on are lost.

    Args:
        model: The model. Its weights, dtype, edits and steering have to be the same in all processes.
        work: A function from the indices of some prompts, a `range`, to the `Result` of a function of this package for
            these prompts alone, in this order. Make in `work` what depends on the prompts, such as a metric.
        prompts: How many prompts there are in all.
        to: The folder. It is created if it does not exist.
        prompts_per_shard: How many prompts a shard holds. If a process is killed, at most so many are computed again.
        rank: (number of this process, number of processes). If None, the environment variables RANK and WORLD_SIZE,
            which `torchrun` and `accelerate launch` set; one process without them.
        progress: Show a progress bar; with None, only if the work lasts.

    Returns:
        The merged result of all prompts, as of `merge_shards`, if all shards exist now. Else None: other processes are
        still running, or were killed.

    Raises:
        ValueError: A shard in the folder was made by another call (other weights, prompts, code or versions; says what
            differs), or is damaged (names the file to delete). Or `work` returned a result of another number of
            prompts.
        TypeError: `work` did not return a `Result`.
        InsideTraceError: Called inside a trace of the model.

    Example:
        task = tasks.capitals(model, n=4)


        def work(some):
            metric = logit_difference([task.correct[i] for i in some], [task.wrong[i] for i in some])
            return activation_patching(model, [task.clean[i] for i in some], [task.corrupted[i] for i in some], metric)


        scores = run_shards(model, work, len(task), "patching")["scores"]  # [prompts, layers, positions]
    """
    model.require_no_trace("run_shards()")
    total, size = count(prompts, "prompts"), count(prompts_per_shard, "prompts_per_shard")
    number, world = rank_of(rank)
    check_progress(progress)
    folder = path_of(to, "to")
    model.prepare()
    require_whole_model(model, world)
    folder.mkdir(parents=True, exist_ok=True)
    asked = {_PROMPTS: total, "prompts_per_shard": size}
    settings = Call(model, "run_shards", asked, {"work": work}).settings()
    mine = range(number, -(-total // size), world)
    with bar(len(mine), "shards", progress) as shown:
        for i in mine:
            _one(folder, i, range(i * size, min(total, (i + 1) * size)), settings, work)
            shown.update(1)
    missing = [i for i in range(-(-total // size)) if not shard_path(folder, i).exists()]
    return None if missing else merge_shards(folder)


def shard_path(folder: Path, number: int) -> Path:
    """The file of a shard."""
    return folder / f"shard-{number:06d}.safetensors"


def _one(folder: Path, number: int, some: range, settings: dict[str, Any], work: Callable[[range], Result]) -> None:
    """Compute one shard, unless it is there."""
    path = shard_path(folder, number)
    if path.exists():
        if wrong := differing(_loaded(path).about[SHARD]["settings"], settings):
            raise ValueError(
                f"{path} was made with {wrong}. Repeat the earlier call, or give another folder for this one."
            )
        return
    made = work(some)
    if not isinstance(made, Result):
        raise TypeError(f"work returns a Result, such as activation_patching() makes, not a {type(made).__name__}.")
    if len(made.labels.get(_PROMPTS, ())) != len(some):
        have = f"has {len(made.labels[_PROMPTS])}" if _PROMPTS in made.labels else "has no axis of prompts"
        raise ValueError(f"work was given {len(some)} prompts, and the {type(made).__name__} it returned {have}.")
    about = {**made.about, SHARD: {"first": some.start, "end": some.stop, "settings": settings}}
    replace(made, about=about).save(path)


def _loaded(path: Path) -> Result:
    """Read a shard.

    Raises:
        ValueError: The file is damaged, or holds a result that `run_shards` did not write.
    """
    try:
        found = Result.load(path)
    except ValueError as error:
        raise ValueError(f"{error} Delete it, and make the same call again: it computes what is missing.") from error
    if SHARD not in found.about:
        raise ValueError(f"{path} holds a result that is no shard of run_shards().")
    return found


def merge_shards(folder: str | Path) -> Result:
    """Read the shards that `run_shards` wrote to a folder, and return the result of all prompts.

    An axis of positions is as long as that of the longest prompt. Entries beyond a shorter prompt are NaN, −1 for
    integers, False for booleans.

    Args:
        folder: The folder that was `to` of `run_shards`.

    Returns:
        A result of the class that `work` returned, with its prompts in order. Tensors are on the CPU, in their dtype.

    Raises:
        FileNotFoundError: There are no shards.
        ValueError: Shards are missing (says which prompts), damaged, or of different calls (says what differs). Or
            `work` computes something over all its prompts together, such as an average, which cannot be merged.

    Example:
        task = tasks.capitals(model, n=4)


        def work(some):
            metric = logit_difference([task.correct[i] for i in some], [task.wrong[i] for i in some])
            return activation_patching(model, [task.clean[i] for i in some], [task.corrupted[i] for i in some], metric)


        run_shards(model, work, len(task), "patching")
        print(merge_shards("patching")["scores"].shape[0])  # → 4
    """
    folder = path_of(folder, "folder")
    paths = sorted(folder.glob("shard-*.safetensors"))
    if not paths:
        raise FileNotFoundError(f"There are no shards in {folder}; run_shards(..., to=...) writes them.")
    shards = [_loaded(path) for path in paths]
    settings = shards[0].about[SHARD]["settings"]
    for path, shard in zip(paths, shards, strict=True):
        if wrong := differing(shard.about[SHARD]["settings"], settings):
            raise ValueError(f"{path} and {paths[0]} are of different calls: the first was made with {wrong}.")
    spans = sorted((shard.about[SHARD]["first"], shard.about[SHARD]["end"]) for shard in shards)
    total, size = settings[_PROMPTS], settings["prompts_per_shard"]
    wanted = [(first, min(total, first + size)) for first in range(0, total, size)]
    if missing := [span for span in wanted if span not in spans]:
        told = ", ".join(f"{first} to {end - 1}" for first, end in missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise ValueError(
            f"{len(missing)} of {len(wanted)} shards are not in {folder}: prompts {told}. Processes are still at work, "
            "or were killed; make the same call again, and it computes what is missing."
        )
    return _merged(sorted(shards, key=lambda shard: shard.about[SHARD]["first"]))


def _merged(shards: Sequence[Result]) -> Result:
    first = shards[0]
    labels: dict[str, tuple[Any, ...]] = {_PROMPTS: tuple(one for shard in shards for one in shard.labels[_PROMPTS])}
    for axis in first.labels:
        if axis != _PROMPTS:
            labels[axis] = max((shard.labels[axis] for shard in shards), key=len)
            if axis == "positions" and all(isinstance(one, int) for shard in shards for one in shard.labels[axis]):
                same = all(shard.labels[axis] == labels[axis] for shard in shards)
                labels[axis] = labels[axis] if same else tuple(range(len(labels[axis])))  # as of prompts in one call
            elif any(shard.labels[axis] != labels[axis][: len(shard.labels[axis])] for shard in shards):
                raise ValueError(f"The shards' labels of the axis {axis} differ, so they do not make one result.")
    tensors = {name: _joined(name, shards, labels) for name in first.tensors}
    width = max((len(tokens) for shard in shards for tokens in shard.tokens), default=0)
    tokens = tuple((*own, *(None,) * (width - len(own))) for shard in shards for own in shard.exact_tokens)
    vocabulary = {i: text for shard in shards for i, text in shard.vocabulary.items()}
    pieces = {i: piece for shard in shards for i, piece in shard.token_bytes.items()}
    return type(first)(tensors, first.axes, labels, tokens, vocabulary, _about(shards), pieces)


def _joined(name: str, shards: Sequence[Result], labels: dict[str, tuple[Any, ...]]) -> torch.Tensor:
    """One tensor of all shards."""
    axes, own = shards[0].axes[name], [shard[name] for shard in shards]
    if _PROMPTS not in axes:
        if all(torch.equal(one, own[0]) for one in own):
            return own[0]
        raise ValueError(
            f"{name} has no axis of prompts, and differs between shards: it is made of all prompts of a call together, "
            "and of shards nothing can be said of all. Run the call in one process."
        )
    at = axes.index(_PROMPTS)
    filled = []
    for one in own:
        shape = [one.shape[at] if axis == _PROMPTS else len(labels[axis]) for axis in axes]
        empty = float("nan") if one.is_floating_point() else False if one.dtype == torch.bool else -1
        whole = one.new_full(shape, empty)
        whole[tuple(slice(length) for length in one.shape)] = one
        filled.append(whole)
    return torch.cat(filled, at)


def _about(shards: Sequence[Result]) -> dict[str, Any]:
    """Merge `about` of the shards: keep what they share, and join lists that have an item for each prompt.

    Raises:
        ValueError: Something else differs.
    """
    every = [{name: value for name, value in shard.about.items() if name != SHARD} for shard in shards]
    sizes = [len(shard.labels[_PROMPTS]) for shard in shards]

    def one(name: str, values: list[Any]) -> Any:
        same = all(value == values[0] for value in values)
        listed = all(isinstance(value, list) and len(value) == size for value, size in zip(values, sizes, strict=True))
        if listed and (name in _BY_PROMPT or not same):
            return [entry for value in values for entry in value]
        if same:
            return values[0]
        if all(isinstance(value, dict) and value.keys() == values[0].keys() for value in values):
            return {key: one(key, [value[key] for value in values]) for key in values[0]}
        raise ValueError(f"The shards differ in {name}: {values[0]!r:.80} and others. They do not make one result.")

    return one("about", every)
