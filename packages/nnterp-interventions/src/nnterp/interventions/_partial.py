"""Partial results: what a call had computed when it was cut short, from which the same call goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch

from nnterp.interventions._engine import Kept
from nnterp.interventions._results import Result
from nnterp.resuming import Call

Resume: TypeAlias = Result | str | Path | None
RUN = "run"  # where `about` of a partial result keeps what the call depended on
DONE = "done"  # the tensor of a partial result that says what is computed
_STATES, _CELLS, _SWEEP = "held_states", "held_cells", "held_sweep"  # what a sweep held when it was cut short

R = TypeVar("R", bound=Result)
T = TypeVar("T")


def resumed(call: Call, resume: Resume) -> Result | None:
    """The partial result that a call goes on from; see `resumed_as`."""
    return resumed_as(Result, call, resume)


def resumed_as(kind: type[T], call: Call, resume: T | str | Path | None) -> T | None:
    """What a call goes on from; None if it begins anew.

    Args:
        kind: The class of what the call returns; it has `load`, and `about` with the record of a partial one's call.
        call: The call.
        resume: A partial one, or the file that it was saved to.

    Raises:
        ValueError: It is complete, or of another call; names what differs.
        FileNotFoundError: There is no such file.
    """
    if resume is None:
        return None
    own: Any = kind
    earlier: Any = resume if isinstance(resume, kind) else own.load(resume)
    call.check(earlier.about.get(RUN), "what was given as resume" if isinstance(resume, kind) else str(resume))
    return earlier


def unfinished(
    call: Call,
    make: Callable[[], R],
    done: torch.Tensor,
    axes: tuple[str, ...],
    kept: Kept | None = None,
    sweep: tuple[int, ...] = (),
    begun: bool | None = None,
) -> R | None:
    """What `make` returns, marked as partial: with the tensor `done`, bool, over `axes`, and the call's record.

    None if nothing is computed: a call that goes on from it would begin anew.

    Args:
        call: The call that was cut short.
        make: Makes a result of what is there.
        done: What is computed.
        axes: Its axes.
        kept: Of the sweep that was cut short: what it held is added as `held_states` and `held_cells`.
        sweep: Which of the call's sweeps it was.
        begun: Whether anything is computed; with None, whether anything is done or held.
    """
    if begun is None:
        begun = bool(done.any())
    if not begun and (kept is None or not kept.held):
        return None
    whole = make()
    whole.tensors[DONE], whole.axes[DONE] = done.clone(), axes
    whole.about[RUN] = call.record
    if kept is not None and kept.held:
        states = torch.stack([*kept.held.values()])
        whole.tensors[_STATES], whole.axes[_STATES] = states, ("held", "hidden")
        whole.tensors[_CELLS], whole.axes[_CELLS] = torch.tensor([*kept.held]), ("held",)
        whole.labels.update(held=tuple(range(len(states))), hidden=tuple(range(states.shape[1])))
        whole.about[_SWEEP] = list(sweep)
    return whole


def held_of(earlier: Result | None, sweep: tuple[int, ...] = ()) -> dict[int, torch.Tensor]:
    """What one sweep of a call that was cut short held; see `Kept.held`."""
    if earlier is None or _STATES not in earlier.tensors or tuple(earlier.about[_SWEEP]) != sweep:
        return {}
    return dict(zip(earlier[_CELLS].tolist(), earlier[_STATES], strict=True))


def kept_of(earlier: Result | None) -> Kept:
    """The cells of one sweep that an earlier call had finished; cells are the entries of its `done`, in order."""
    if earlier is None:
        return Kept()
    done, own = earlier[DONE], (DONE, _STATES, _CELLS)
    results = {
        name: tensor.flatten(0, done.dim() - 1).clone() for name, tensor in earlier.tensors.items() if name not in own
    }
    return Kept(results, set(done.flatten().nonzero()[:, 0].tolist()), held_of(earlier))


def cells_of(kept: Kept, *shape: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The results of a sweep's cells as `[*shape, ...]`, and which are done, bool `[*shape]`."""
    done = torch.zeros(shape, dtype=torch.bool)
    done.view(-1)[list(kept.done)] = True
    return {name: tensor.unflatten(0, shape) for name, tensor in kept.results.items()}, done


def ids_of(*prompts: Any) -> list[list[tuple[int | str, ...]]]:
    """What tells lists of prompts from others: token ids, digests of images, and what encoders read."""
    return [[row.identity for row in rows] for rows in prompts]
