"""Edits of values, the cells of a sweep made of them, and how edits are written into the rows of a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from nnterp.errors import ShapeError
from nnterp.record import Record
from nnterp.values import Label, Value, get_label, get_value

At: TypeAlias = int | tuple[int, int]  # a layer, or a layer and the number of one of its dictionaries
Key: TypeAlias = tuple[str, At | None]

POSITION_AXES = ("seq", "query", "keys")
UNIT_AXES = ("heads", "kv_heads", "neurons", "experts", "features")


class Edit(Record):
    """Replace one value of one layer at some positions, for some heads.

    Attributes:
        value: Name of the value, such as "layers_output".
        layer: Its layer, for features with the number of the dictionary if the layer has several; None for values that
            are not per layer.
        positions: Over the prompt's own tokens, from 0.
        new: The replacement: a tensor with the value's axes without the batch, cut to these positions and heads (or
            anything that broadcasts to that); or a function from the current tensor to that.
        heads: Indices on the value's axis of heads (or neurons); all if None.
    """

    def __init__(
        self,
        value: str,
        layer: At | None,
        positions: tuple[int, ...],
        new: torch.Tensor | Callable[[torch.Tensor], torch.Tensor],
        heads: tuple[int, ...] | None = None,
    ) -> None:
        self.value, self.layer, self.positions, self.new, self.heads = value, layer, positions, new, heads


@dataclass(frozen=True)
class Cell:
    """One run of a sweep: the index of a prompt, and the edits made in its forward pass."""

    prompt: int
    edits: tuple[Edit, ...]

    @property
    def first_position(self) -> int:
        """The first position that may differ from the unedited run."""
        return min((min(edit.positions) for edit in self.edits), default=1 << 30)

    @property
    def last_position(self) -> int:
        """The last position that is edited; -1 if none is."""
        return max((max(edit.positions) for edit in self.edits), default=-1)

    def first_layer(self, num_layers: int) -> int:
        """The first layer whose run may differ from the unedited one."""
        return min((first_layer(edit, num_layers) for edit in self.edits), default=num_layers)


def first_layer(edit: Edit, num_layers: int) -> int:
    """The first layer that must run after an edit. An edit of a layer's output needs only the layers after it."""
    value = get_value(edit.value)
    if edit.layer is None:
        return 0 if value.rank == 0 else num_layers
    layer = layer_of(edit.layer)
    return layer + 1 if edit.value == "layers_output" else layer


def layer_of(at: At) -> int:
    """The layer alone."""
    return at[0] if isinstance(at, tuple) else at


def label_of(name: str, at: At | None) -> str:
    """How a value is called: "layers_output[3]", "features[3, 1]"."""
    return name if at is None else f"{name}[{', '.join(map(str, at if isinstance(at, tuple) else (at,)))}]"


def axes_of(value: Label | Value) -> tuple[str, ...]:
    """Names of a value's axes, the batch first: ("batch", "seq", "hidden")."""
    return tuple(axis.strip() for axis in value.shape.strip("[]").split(","))


def axis_index(value: Label | Value, names: Sequence[str]) -> int | None:
    """Index of the axis with one of these names, not counting the batch; None if there is none."""
    return next((i for i, axis in enumerate(axes_of(value)[1:]) if axis in names), None)


def positions_axis(name: str) -> int:
    """Index of a value's axis of positions, not counting the batch.

    Raises:
        ValueError: It has none.
    """
    value = get_label(name)
    axis = axis_index(value, POSITION_AXES)
    if axis is None:
        raise ValueError(
            f"{name} has the axes {value.shape} and none for positions, so it cannot be edited at positions."
        )
    return axis


def units_axis(name: str) -> int:
    """Index of a value's axis of heads or neurons, not counting the batch.

    Raises:
        ValueError: It has none; the message names values that have one.
    """
    value = get_label(name)
    axis = axis_index(value, UNIT_AXES)
    if axis is None:
        raise ValueError(
            f"{name} has the axes {value.shape} and none for heads or neurons; take a value that has one, such as "
            f"attention_head_outputs or mlp_neurons."
        )
    return axis


def rows_of(tensor: torch.Tensor, rows: int, seq: int, value: Label | Value) -> torch.Tensor:
    """A view of a value `[rows, seq, ...]`, where the model may keep batch and positions in one axis.

    OPT's MLP does; and rows that joined a running batch may pass in one row of all their positions.

    Args:
        tensor: The value.
        rows: Rows of the batch.
        seq: Positions that run.
        value: Its label.

    Raises:
        ShapeError: The shape does not show which axis is the batch.
    """
    axes = len(axes_of(value))
    if tensor.dim() < axes and tensor.shape[0] == rows * seq:
        return tensor.unflatten(0, (rows, seq))
    if rows > 1 and tensor.dim() == axes and tensor.shape[:2] == (1, rows * seq):  # rows that joined a running batch
        return tensor[0].unflatten(0, (rows, seq))
    batch_first = tensor.shape[0] == rows
    if batch_first and tensor.dim() > axes:  # several streams side by side, after batch and positions
        batch_first = tensor.shape[1] == seq
    if tensor.dim() < axes or not batch_first:
        raise ShapeError(
            f"{value.name} has shape {list(tensor.shape)} in a batch of {rows} prompts of {seq} tokens, "
            f"not {value.shape}: the axis of the prompts cannot be told."
        )
    return tensor


def index_of(edit: Edit, offset: int, device: torch.device) -> tuple[Any, ...]:
    """The index of an edit's entries in one row of its value, whose first position is `offset`."""
    value = get_label(edit.value)
    where: list[Any] = [slice(None)] * (len(axes_of(value)) - 1)
    at = positions_axis(edit.value)
    positions = torch.tensor([p - offset for p in edit.positions], device=device)
    if edit.heads is None:
        where[at] = positions
        return tuple(where)
    units = units_axis(edit.value)
    heads = torch.tensor(edit.heads, device=device)
    where[at] = positions[:, None] if at < units else positions[None, :]
    where[units] = heads[None, :] if at < units else heads[:, None]
    return tuple(where)


def _begin(value: Label | Value, row: torch.Tensor, seq: int, offset: int) -> int:
    """The prompt's position at which one row of a value begins, when `seq` positions run from `offset` on.

    Keys and values of attention may also hold the cached positions before `offset`, and then begin at 0.

    Raises:
        ShapeError: The row has neither as many positions as run, nor as many as the prompt.
    """
    axis = positions_axis(value.name)
    if axes_of(value)[1 + axis] != "keys" or row.shape[axis] == seq:
        return offset
    if row.shape[axis] == seq + offset:
        return 0
    raise ShapeError(
        f"{value.name} is {list(row.shape)} in one row ({value.shape} without the batch), which is neither as long as "
        f"the {seq} positions that run nor as the {seq + offset} of the prompt."
    )


def apply_edits(
    tensor: torch.Tensor, edits: Iterable[tuple[int, Edit]], size: tuple[int, int], offset: int
) -> torch.Tensor:
    """A copy of one value with edits written into it.

    Args:
        tensor: The value.
        edits: Pairs of a row and an edit of this value.
        size: Rows of the batch and positions that run.
        offset: The first position that runs.

    Raises:
        ShapeError: An edit's tensor does not have the shape of what it replaces.
    """
    copy = tensor.clone()
    value = None
    for row, edit in edits:
        value = value or get_label(edit.value)
        view = rows_of(copy, *size, value)[row]
        index = index_of(edit, _begin(value, view, size[1], offset), copy.device)
        new = edit.new(view[index]) if callable(edit.new) else edit.new
        try:
            view[index] = new.to(device=copy.device, dtype=copy.dtype)
        except (RuntimeError, IndexError) as error:
            at = f"positions {list(edit.positions)}" + ("" if edit.heads is None else f", heads {list(edit.heads)}")
            raise ShapeError(
                f"{label_of(edit.value, edit.layer)} is {list(view.shape)} in one row ({value.shape} without the "
                f"batch); a tensor of shape {list(new.shape)} does not fit at {at} ({error})."
            ) from error
    return copy
