"""A call over many prompts in shards: several processes run a share each, and what they found is merged."""

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

SHARD = "shard"  # where `about` of a stored result keeps which shard it is
_PROMPTS = "prompts"
_BY_PROMPT = ("clean", "corrupted")  # of a call's record: lists with an entry for each prompt


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
    """Call `work` for some prompts at a time and keep each result in a folder; several processes share the calls.

    Start the same program in every process. Process r of n computes shards r, r + n, r + 2n and so on, each a file that
    is written at once when it is whole. Processes do not communicate: they need a folder that all of them see. Shards
    that are there are not computed again, so a program that was killed is started again as it was, with any number of
    processes; at most the shards it was working on are lost. Shards do not depend on the number of processes.

    Args:
        model: The model. Its weights, dtype, edits and steering have to be the same in all processes.
        work: Given the indices of some prompts, a `range`, returns the `Result` of a function of this package for these
            prompts alone, in this order. Whatever depends on prompts, a metric for instance, it makes of these.
        prompts: How many there are.
        to: The folder. It is made if it is not there.
        prompts_per_shard: How many prompts a shard holds; its result is lost if the process is killed meanwhile.
        rank: The number of this process and how many there are; RANK and WORLD_SIZE if None, as `torchrun` and
            `accelerate launch` set them; one process without these.
        progress: Show a progress bar; with None, only if the work lasts.

    Returns:
        The result of all prompts if all shards are there now (see `merge_shards`), else None: other processes are still
        at work, or have been killed.

    Raises:
        ValueError: A shard in the folder was made by another call: other weights, prompts, code or versions; names what
            differs. Or it is damaged; names the file, which is to be deleted.
        TypeError: `work` returns no `Result`.
        InsideTraceError: Called inside a trace of the model.

    Example:
        >>> def work(some):
        ...     own = [pairs[i] for i in some]
        ...     metric = logit_difference([p.right for p in own], [p.wrong for p in own])
        ...     return activation_patching(model, [p.clean for p in own], [p.corrupted for p in own], metric)
        >>> scores = run_shards(model, work, len(pairs), "patching")
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
    """A shard.

    Raises:
        ValueError: It is damaged, or a result that is no shard.
    """
    try:
        found = Result.load(path)
    except ValueError as error:
        raise ValueError(f"{error} Delete it, and make the same call again: it computes what is missing.") from error
    if SHARD not in found.about:
        raise ValueError(f"{path} holds a result that is no shard of run_shards().")
    return found


def merge_shards(folder: str | Path) -> Result:
    """The result of all prompts, from the shards that `run_shards` has written to a folder.

    Axes of positions are as long as the longest; entries that a shorter prompt does not have are NaN, −1 for integers.

    Args:
        folder: The folder.

    Returns:
        A result of the class that `work` returned, its prompts in order.

    Raises:
        FileNotFoundError: There are no shards.
        ValueError: Shards are missing (names their prompts), damaged, or of different calls (names what differs); or
            `work` makes something of all its prompts together, an average for instance, so that shards have no sum.
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
    tokens = tuple((*own, *(None,) * (width - len(own))) for shard in shards for own in shard.tokens)
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
    """The record of the call: what all shards share, and lists with an entry for each prompt joined.

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
