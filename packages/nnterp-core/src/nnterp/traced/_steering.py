"""Add a vector to the residual stream of the running forward pass, or change its component along a direction."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from nnsight.intervention.interleaver import Mediator
from torch._subclasses.fake_tensor import is_fake

from nnterp.errors import ShapeError
from nnterp.record import Record
from nnterp.selectors import Selector
from nnterp.traced._accessors import layer_index, require_running
from nnterp.traced._own_tokens import Pass
from nnterp.traced._steps import in_a_loop, in_steps, read_steps

if TYPE_CHECKING:
    from nnterp.traced._running import Running

MODES = ("add", "project_out", "clamp", "affine")


# vectors: layer → vector, in forward order. steps: as in `read_steps`. condition: only rows whose prompt fulfils it are
# steered, see `_conditions`; only for `model.steering`. others: the other arguments of `change` and `selected`.
class Steering(Record):
    """What is done to the stream leaving some layers, at which tokens of which rows, in which steps."""

    def __init__(self, vectors: dict[int, torch.Tensor], steps: Any, condition: Any, others: dict[str, Any]) -> None:
        self.vectors, self.steps, self.condition, self.others = vectors, steps, condition, others

    def begun(self, model: Running) -> SteeredRun:
        """The edit for one run of the model."""
        return SteeredRun(model, self)


class SteeredRun:
    """A steering in one run: what it does in each forward pass, and which rows its condition chose."""

    def __init__(self, model: Running, steering: Steering, exact: bool = False) -> None:
        self.model, self.steering, self.rows = model, steering, None
        self.steps = read_steps(steering.steps)
        self.exact = exact or 0 not in self.steps  # whether every position has to be in the pass that is edited

    def __call__(self, step: int) -> None:
        """Steer the forward pass that is running."""
        own, condition = self.steering.others, self.steering.condition
        if step not in self.steps and (step or condition is None):
            return
        what, where = "steer", None
        everywhere = own["token_positions"] is None and own["batch_index"] is None
        for layer, vector in self.steering.vectors.items():  # in forward order
            if condition is not None and self.rows is None and layer >= condition.layer:
                self.rows = condition.rows(self.model)
            if step not in self.steps:
                continue
            stream = self.model.layers_output[layer]
            if where is None and not everywhere:  # the same in all layers of a pass
                where = selected(self.model, stream, step, self.exact, own["token_positions"], own["batch_index"], what)
            new = steered(stream, vector, where, own, f"{what}: layer {layer}")
            if self.rows is not None:
                new = torch.where(self.rows.to(stream.device).view(-1, 1, 1), new, stream)
            self.model.layers_output[layer] = new


def steer(
    model: Running,
    layers: Any,
    vector: Any,
    factor: float,
    token_positions: Any,
    batch_index: Any,
    steps: Any = None,
    mode: str = "add",
    keep_norm: bool = False,
    origin: Any = None,
) -> None:
    """Steer the running pass and, in a generation, the later ones that `steps` chooses."""
    require_running(model, "steer()")
    steering = steering_of(
        model.num_layers, layers, vector, factor, token_positions, batch_index, steps, mode, keep_norm, origin
    )
    in_steps(model, SteeredRun(model, steering, exact=in_a_loop()), steps)


def steering_of(
    num_layers: int,
    layers: Any,
    vector: Any,
    factor: float,
    token_positions: Any,
    batch_index: Any,
    steps: Any,
    mode: str,
    keep_norm: bool,
    origin: Any,
) -> Steering:
    """The arguments of `model.steer`, read and checked; raises TypeError, ValueError or IndexError for bad ones."""
    if mode not in MODES:
        raise ValueError(f"steer: mode={mode!r} is not one of {', '.join(MODES)}.")
    if (mode == "affine") != (origin is not None):
        raise ValueError(f"steer: mode='affine' needs origin=, and no other mode takes it; mode is {mode!r}.")
    read_steps(steps)
    if isinstance(factor, (bool, str)) or not abs(factor) < float("inf"):
        raise ValueError(f"steer: factor={factor!r} is no finite number.")
    given = getattr(vector, "directions", vector)  # a SteeringVector
    if layers is None:
        wanted = sorted(given) if isinstance(given, Mapping) else range(num_layers)
    else:
        single = not isinstance(layers, Iterable) or (isinstance(layers, torch.Tensor) and layers.dim() == 0)
        wanted = sorted({layer_index(i, num_layers, "steer(layers=...)") for i in ([layers] if single else layers)})
    if not wanted:
        raise ValueError("steer: layers is empty, so nothing would be steered.")
    vectors = {}
    for layer in wanted:
        if isinstance(given, Mapping) and layer not in given:
            raise ValueError(f"steer: there is no vector for layer {layer}; there are vectors for {sorted(given)}.")
        own = given[layer] if isinstance(given, Mapping) else given
        vectors[layer] = _real(own, mode, f"the vector for layer {layer}")
    others = {
        "factor": factor,
        "token_positions": read_positions(token_positions),
        "batch_index": batch_index,
        "mode": mode,
        "keep_norm": keep_norm,
        "origin": None if origin is None else _real(origin, "add", "origin"),
    }
    return Steering(vectors, steps, None, others)


def _real(vector: Any, mode: str, label: str) -> torch.Tensor:
    if not isinstance(vector, torch.Tensor):
        try:
            vector = torch.as_tensor(vector, device="cpu")
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"steer: {label} is a {type(vector).__name__}; give a tensor [hidden].") from None
    if vector.is_complex() or vector.dtype == torch.bool:
        raise TypeError(f"steer: {label} has dtype {vector.dtype}; give real numbers.")
    if vector.device.type != "meta" and not is_fake(vector):
        if not torch.isfinite(vector).all():
            raise ValueError(f"steer: {label} is not finite.")
        if mode != "add" and not vector.any():
            raise ValueError(f"steer: {label} is zero, so it has no direction for mode={mode!r}.")
    return vector if vector.is_floating_point() else vector.float()


def read_positions(positions: Any) -> Any:
    """`token_positions` as None, one index, slice or selector, or a list of these."""
    if positions is None or isinstance(positions, (slice, Selector)):
        return positions
    if isinstance(positions, str):
        raise TypeError(
            f"steer: token_positions={positions!r} is text; select it with nnterp.positions.at({positions!r})."
        )
    if isinstance(positions, torch.Tensor):
        positions = positions.tolist() if not positions.is_floating_point() else None
    elif hasattr(positions, "tolist"):
        positions = positions.tolist()
    single = not isinstance(positions, Iterable)
    entries = [positions] if single else list(positions)
    for entry in entries:
        if isinstance(entry, bool) or not (hasattr(entry, "__index__") or isinstance(entry, (slice, Selector))):
            raise TypeError(
                f"steer: token_positions={positions!r}; give an index, a slice, at('text'), a list of these, or None."
            )
    if not entries:
        raise ValueError("steer: token_positions is empty, so nothing would be steered. Leave it out to steer all.")
    return entries[0] if single else entries


# `shape` is that of what is steered, without the hidden axis, or None where rows have different numbers of positions.
# A column is -1 where this pass does not run the position.
def selected(
    model: Running, stream: torch.Tensor, step: int, exact: bool, positions: Any, batch_index: Any, what: str
) -> Any:
    """Where the stream `[rows, seq, hidden]` is steered: `(rows, columns, shape)`."""
    own = Pass(model, stream, step, Mediator.current(what).batch_group, what)
    every = list(range(own.rows))
    try:
        rows = every[batch_index] if isinstance(batch_index, slice) else _rows(batch_index, every, what)
    except IndexError:
        raise IndexError(f"{what}: batch_index={batch_index!r}, but there are {own.rows} rows.") from None
    if not rows:
        raise ValueError(f"{what}: batch_index={batch_index!r} chooses no rows.")
    several = isinstance(positions, list)
    entries = positions if several else [slice(None) if positions is None else positions]
    plain = not any(isinstance(entry, (slice, Selector)) for entry in entries)
    listed = batch_index is not None and not isinstance(batch_index, slice) and not hasattr(batch_index, "__index__")
    if several and plain and listed:  # paired, as in stream[rows, positions]
        if len(entries) != len(rows):
            raise ValueError(f"{what}: {len(rows)} rows and {len(entries)} positions cannot be paired.")
        columns = [own.find(row, [entry], exact) for row, entry in zip(rows, entries, strict=True)]
        shape: tuple[int, ...] | None = (len(rows),)
    else:
        columns = [own.find(row, entries, exact) for row in rows]
        counts = {len(found) for found in columns}
        single = plain and not several
        axes = () if hasattr(batch_index, "__index__") else (len(rows),)
        shape = (*axes, *(() if single else (min(counts),))) if len(counts) == 1 else None
    if step == 0 and not model.interleaver.stepping and not any(columns):
        raise ValueError(f"{what}: token_positions={positions!r} selects no token in any row.")
    flat_rows = [
        row * own.copies + copy
        for row, found in zip(rows, columns, strict=True)
        for copy in range(own.copies)
        for _ in found
    ]
    flat_columns = [column for found in columns for _ in range(own.copies) for column in found]
    device = stream.device
    index = torch.tensor(flat_rows, device=device), torch.tensor(flat_columns, device=device)
    return (*index, shape if own.copies == 1 else None)


def _rows(batch_index: Any, every: list[int], what: str) -> list[int]:
    if batch_index is None:
        return every
    if isinstance(batch_index, torch.Tensor) or hasattr(batch_index, "tolist"):
        batch_index = batch_index.tolist()
    indices = [batch_index] if hasattr(batch_index, "__index__") else list(batch_index)
    if any(isinstance(index, bool) or not hasattr(index, "__index__") for index in indices):
        raise TypeError(f"{what}: batch_index={batch_index!r}; give rows of the batch by index, or a slice.")
    return [every[index] for index in indices]


def steered(stream: torch.Tensor, vector: torch.Tensor, where: Any, own: dict[str, Any], what: str) -> torch.Tensor:
    """The stream with the change made where `where` says, as a new tensor."""
    try:
        if where is None:
            new = change(stream, vector.to(stream.device), own)
            if new.shape != stream.shape:
                raise RuntimeError(f"it would become {list(new.shape)}")
            return new
        rows, columns, shape = where[0].to(stream.device), where[1].to(stream.device), where[2]
        here = columns >= 0
        if shape is not None and vector.dim() > 1:
            vector = vector.expand(*shape, stream.shape[-1]).reshape(-1, stream.shape[-1])[here.cpu()]
        elif vector.dim() > 1:
            raise RuntimeError("rows have different numbers of positions, so it must be [hidden]")
        rows, columns = rows[here], columns[here]
        new = stream.clone()
        new[rows, columns] = change(stream[rows, columns], vector.to(stream.device), own)
        return new
    except RuntimeError as error:
        raise ShapeError(
            f"{what}: the stream leaving it has shape {list(stream.shape)} (batch, seq, hidden); a vector of shape "
            f"{list(vector.shape)} at token_positions={own['token_positions']}, batch_index={own['batch_index']} does "
            f"not fit ({error})."
        ) from error


def change(stream: torch.Tensor, vector: torch.Tensor, own: dict[str, Any]) -> torch.Tensor:
    """`[..., hidden]` after the change: a vector added, or the component along it set to a value."""
    factor, mode = own["factor"], own["mode"]
    if mode == "add":
        new = stream + factor * vector.to(stream.dtype)
    else:
        wide = torch.promote_types(stream.dtype, torch.float32)
        length = vector.to(wide).norm(dim=-1, keepdim=True)
        unit = vector.to(wide) / length
        along = (stream.to(wide) * unit).sum(-1, keepdim=True)
        if mode == "project_out":
            target = (1 - factor) * along
        elif mode == "clamp":
            target = torch.full_like(along, factor)
        else:
            target = (own["origin"].to(along) * unit).sum(-1, keepdim=True) + factor * length
        new = (stream.to(wide) + (target - along) * unit).to(stream.dtype)
    if own["keep_norm"]:
        wide = torch.promote_types(stream.dtype, torch.float32)
        before, after = stream.to(wide).norm(dim=-1, keepdim=True), new.to(wide).norm(dim=-1, keepdim=True)
        new = (new.to(wide) * before / after.clamp(min=1e-30)).to(stream.dtype)
    return new
