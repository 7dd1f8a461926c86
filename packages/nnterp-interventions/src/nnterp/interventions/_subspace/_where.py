"""Where a subspace lives: one value of one layer, at some positions of each pair of prompts, of one head or of all."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from nnterp.errors import ShapeError
from nnterp.interventions._engine import Cell, Edit, index_of
from nnterp.interventions._grid import Grid
from nnterp.interventions._pairs import Pairs
from nnterp.interventions._states import States
from nnterp.values import get_value

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer


class Where:
    """One value of one layer, at some positions of each pair of prompts, of one head or of all.

    Attributes:
        key: The value's name and layer.
        heads: The head; None for all of the value.
        asked: The positions that were asked for, as a text.
        columns: For each pair the positions in the run patched into, and in the source.
    """

    def __init__(
        self, model: StandardizedTransformer, pairs: Pairs, value: str, layer: int, positions: Any, head: int | None
    ) -> None:
        if get_value(value).is_pattern:
            raise ValueError(f"{value} has as many numbers as there are keys, so prompts share no subspace of it.")
        grid = Grid(model, pairs, [value], layer, positions, None if head is None else [head])
        if len(grid.layers) != 1:
            raise ValueError(f"A subspace belongs to one layer; layer={layer!r:.80} are {len(grid.layers)}.")
        self.key, self.asked = (value, grid.layers[0]), repr(positions)
        self.heads = None if grid.units == [None] else tuple(unit for unit in grid.units if unit is not None)
        self.columns = [
            (tuple(p for at, _ in columns for p in at), tuple(p for _, at in columns for p in at))
            for columns in grid.where
        ]

    def given(self, pair: int, states: States) -> torch.Tensor:
        """What the source has at a pair's positions, `[positions, ...]`."""
        source, at = states[self.key], self.columns[pair][1]
        return source[index_of(Edit(*self.key, at, lambda x: x, self.heads), 0, source.device)]

    def edit(self, pair: int, given: torch.Tensor, basis: torch.Tensor | None) -> Edit:
        """Put what the source has into the run, in a subspace only or (for None) all of it."""
        new = given if basis is None else within(basis, given)
        return Edit(*self.key, self.columns[pair][0], new, self.heads)

    def cell(self, prompt: int, pair: int, given: torch.Tensor, basis: torch.Tensor | None) -> Cell:
        """The cell that makes the edit; arguments as `edit`."""
        return Cell(prompt, (self.edit(pair, given, basis),))

    def width(self, given: torch.Tensor) -> int:
        """Numbers of the value at one position."""
        return given[0].numel()


def within(basis: torch.Tensor, given: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function of values `[positions, ...]` that returns them with the part in a subspace taken from `given`."""

    def patched(current: torch.Tensor) -> torch.Tensor:
        own = basis.to(current.device)
        change = (given.to(current) - current).reshape(len(current), -1).to(own.dtype)
        return current + (change @ own @ own.T).reshape(current.shape).to(current)

    return patched


def random_basis(width: int, dimensions: int, generator: torch.Generator) -> torch.Tensor:
    """Orthonormal columns that span a random subspace, float32 `[width, dimensions]`."""
    return torch.linalg.qr(torch.randn(width, dimensions, generator=generator, dtype=torch.float64))[0].float()


def orthonormal(given: Any, width: int) -> torch.Tensor:
    """A basis as orthonormal columns that span the same, float32 `[width, dimensions]` on the CPU.

    Raises:
        TypeError: It is no floating point tensor.
        ShapeError: It does not have as many rows as the value has numbers.
        ValueError: Its columns are not finite, or not independent.
    """
    if not isinstance(given, torch.Tensor) or not given.is_floating_point():
        raise TypeError(f"basis is a tensor [width, dimensions], or what fit_subspace returned; not {given!r:.80}.")
    columns = given[:, None] if given.dim() == 1 else given
    if columns.dim() != 2 or columns.shape[0] != width or not 1 <= columns.shape[1] <= width:
        raise ShapeError(
            f"basis has shape {list(given.shape)}; it must be [{width}, dimensions], one row for each number that the "
            f"value has at a position, and at most {width} columns."
        )
    columns = columns.detach().cpu().double()
    if not torch.isfinite(columns).all():
        raise ValueError("basis holds numbers that are not finite.")
    made, triangle = torch.linalg.qr(columns / columns.norm(dim=0).clamp(min=1e-300))
    if triangle.diagonal().abs().min() < 1e-6:
        raise ValueError(f"The {columns.shape[1]} columns of basis span fewer dimensions: some depend on others.")
    return made.float()
