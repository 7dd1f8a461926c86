"""Estimated effects of nodes: what putting one run's values into another changes, by the gradient of the metric."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nnterp.interventions._attribution._softmax import (
    KEYS,
    PATTERN,
    QUERIES,
    attention_of,
    effect_of_keys,
    effects_of_queries,
)
from nnterp.interventions._engine import POSITION_AXES, UNIT_AXES, Key, axes_of, layer_of
from nnterp.interventions._grid import Column
from nnterp.interventions._states import States
from nnterp.values import get_value


def first_order(
    key: Key, columns: Sequence[Column], units: Sequence[int | None], into: States, source: States, gradients: States
) -> torch.Tensor:
    """The effects of one value and layer to first order: (source − into) · gradient, summed over what is patched.

    Args:
        key: The value's name and layer.
        columns: Positions that are patched together, in the run patched into and in the source.
        units: Heads or neurons, each patched on its own; `[None]` for all together.
        into, source: The values in both runs.
        gradients: The gradient of the metric of the run patched into.

    Returns:
        `[units, columns]`, float32.
    """
    at, at_source = _positions(columns, source[key].device)
    change = _entries(source[key], key[0], at_source) - _entries(into[key], key[0], at)
    each = (change.float() * _entries(gradients[key], key[0], at).float()).sum(-1)
    return _by_column(each, columns, units)


def through_softmax(
    key: Key,
    columns: Sequence[Column],
    units: Sequence[int | None],
    into: States,
    source: States,
    gradients: States,
    factor: torch.Tensor,
) -> torch.Tensor:
    """The effects of queries or keys by the pattern that they make: (new pattern − old) · its gradient.

    Arguments and returns as `first_order`; `factor` as `scales` returns it.
    """
    name, at_layer = key
    assert at_layer is not None
    layer = layer_of(at_layer)
    attention, slope, patched = attention_of(into, layer), gradients[PATTERN, layer], source[key]
    if name == QUERIES:
        at, at_source = _positions(columns, patched.device)
        each = effects_of_queries(attention, patched[at_source], factor, slope, at)
        return _by_column(each, columns, units)
    made = [patched.new_zeros(patched.shape[1], dtype=torch.float32) for _ in columns]
    for c, column in enumerate(columns):
        if column[0]:
            at, at_source = _positions([column], patched.device)
            made[c] = effect_of_keys(attention, patched[at_source], factor, slope, at)
    return _of_units(torch.stack(made), units)


def is_recomputed(name: str) -> bool:
    """Whether a value's effect goes through the softmax alone."""
    return name in (QUERIES, KEYS)


def _positions(columns: Sequence[Column], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """All positions of some columns, in the run patched into and in the source."""
    at, at_source = ([p for column in columns for p in column[side]] for side in (0, 1))
    return torch.tensor(at, dtype=torch.long, device=device), torch.tensor(at_source, dtype=torch.long, device=device)


def _entries(tensor: torch.Tensor, name: str, at: torch.Tensor) -> torch.Tensor:
    """A value at some positions, `[positions, units, rest]`; one unit if the value has none."""
    axes = axes_of(get_value(name))[1:]
    where = next(i for i, axis in enumerate(axes) if axis in POSITION_AXES)
    unit = next((i for i, axis in enumerate(axes) if axis in UNIT_AXES), None)
    some = tensor.index_select(where, at)
    moved = some.movedim(where, 0).unsqueeze(1) if unit is None else some.movedim((where, unit), (0, 1))
    return moved.reshape(moved.shape[0], moved.shape[1], -1 if moved.numel() else 1)


def _by_column(each: torch.Tensor, columns: Sequence[Column], units: Sequence[int | None]) -> torch.Tensor:
    """Effects of positions `[positions, all units]`, summed over each column's: `[units, columns]`."""
    column = torch.tensor([c for c, (at, _) in enumerate(columns) for _ in at], dtype=torch.long, device=each.device)
    made = each.new_zeros(len(columns), each.shape[1]).index_add(0, column, each)
    return _of_units(made, units)


def _of_units(made: torch.Tensor, units: Sequence[int | None]) -> torch.Tensor:
    """`[columns, all units]` as `[units, columns]`; the sum over all for `[None]`."""
    if list(units) == [None]:
        return made.sum(1)[None]
    return made[:, torch.tensor([unit for unit in units if unit is not None], device=made.device)].T
