"""Apply a user's function to what was selected of a batch, inside the trace, so that padding never enters it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch

from nnterp.collection._select import Selection

Reduce = Literal["mean", "sum"] | Callable[[torch.Tensor], torch.Tensor] | None


def check_reduce(reduce: Any) -> None:
    """Raise unless it is "mean", "sum", a function or None.

    Raises:
        ValueError: It is something else.
    """
    if reduce is not None and not callable(reduce) and not (isinstance(reduce, str) and reduce in ("mean", "sum")):
        raise ValueError(f"reduce is 'mean', 'sum', a function or None, not {reduce!r}.")


def reduced(
    reduce: Callable[[torch.Tensor], torch.Tensor], tensor: torch.Tensor, picked: Selection, shape: str
) -> torch.Tensor:
    """What a function makes of a value, `[rows, ...]`.

    Where rows have different numbers of positions (or of keys, for a pattern), the function is called for each row with
    the row's own, and what it returns is filled up with zeros.

    Raises:
        ValueError: The function does not keep the first axis.
    """
    pattern = shape.endswith("query, key]")
    ragged = not bool(picked.mask.all()) or (pattern and len(set(picked.lengths.tolist())) > 1)
    if not ragged:
        return checked(reduce(tensor), tensor.shape[0]).detach()
    made = [checked(reduce(own_part(tensor, i, picked, pattern)), 1) for i in range(tensor.shape[0])]
    if len({part.dim() for part in made}) > 1:
        raise ValueError("reduce must return as many axes for every prompt; it returned different numbers of them.")
    largest = [max(part.shape[axis] for part in made) for axis in range(1, made[0].dim())]
    whole = made[0].new_zeros([len(made), *largest])
    for i, part in enumerate(made):
        whole[(i, *(slice(0, size) for size in part.shape[1:]))] = part[0]
    return whole.detach()


def own_part(tensor: torch.Tensor, row: int, picked: Selection, pattern: bool) -> torch.Tensor:
    """The positions of one row, `[1, positions, ...]`, and of a pattern its keys."""
    own = tensor[row : row + 1]
    if not picked.single:
        own = own.narrow(2 if pattern else 1, 0, int(picked.mask[row].sum()))
    return own.narrow(own.dim() - 1, 0, int(picked.lengths[row])) if pattern else own


def checked(made: Any, rows: int) -> torch.Tensor:
    """Check what a function returned, which must have one entry for each row; returns it as it is, dtype and device
    included.

    Raises:
        ValueError: It is no tensor, or has another number of entries.
    """
    if not isinstance(made, torch.Tensor) or made.dim() < 1 or made.shape[0] != rows:
        got = list(made.shape) if isinstance(made, torch.Tensor) else type(made).__name__
        raise ValueError(f"reduce must keep the first axis, which is {rows} prompts here; it returned {got}.")
    return made
