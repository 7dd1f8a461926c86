"""What is read in each request: the plan, what the engine is told of positions, and the reads themselves."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from nnterp.collection import OUTPUTS, Plan, Reduce, Target, checked, named, only
from nnterp.indices import read_index, read_indices
from nnterp.inputs import Row
from nnterp.table import VALUES, get_label
from nnterp.traced import read_value
from nnterp.values import canonical

if TYPE_CHECKING:
    from nnterp.vllm._engine import TracedVLLM

Order: TypeAlias = list[tuple[str, int | None]]  # (value, layer), in the order in which the model computes them
Lists: TypeAlias = tuple[tuple[int, ...] | None, ...]  # lists of positions of one prompt; None for all of them
Wanted: TypeAlias = Lists | dict[tuple[int, ...], Lists]  # the same of every prompt, or by a prompt's token ids
LAST: Lists = ((-1,),)
_AFTER = {"logits": 1.0, "next_token_probs": 2.0}


def plan_of(model: TracedVLLM, values: Any, layers: Any) -> Plan:
    """The targets of a `collect`.

    Raises:
        ValueError: There is no such value, or none was asked for.
        IndexError: There is no such layer.
        Unavailable: A layer that was asked for does not have the value.
    """
    asked: dict[str, tuple[int, ...]] = {}
    for name in [values] if isinstance(values, str) else list(values):
        if name in OUTPUTS:
            asked[name] = ()
            continue
        value, at = canonical(name)
        there = asked.setdefault(value.name, ())
        if not value.per_layer:
            model.place(value.name)
            continue
        if at is not None:
            mine: Sequence[int] = [read_index(at, model.num_layers, f"The layer of {name}", "layers")]
        elif layers is not None:
            mine = read_indices(layers, model.num_layers, "layers", "layers")
        else:
            mine = model.served.having(value.name)
        for layer in mine or range(model.num_layers):
            model.place(value.name, layer)
        asked[value.name] = (*there, *(layer for layer in mine if layer not in there))
    if not asked:
        raise ValueError("No values were asked for.")
    targets = tuple(
        Target(named(name)[0], layer, (), only)
        for name, mine in asked.items()
        for layer in (tuple(dict.fromkeys(mine)) or (None,))
    )
    return Plan((), targets, (), (), asked)  # type: ignore[arg-type]


def order_of(plan: Plan) -> Order:
    """The targets of a plan in forward order."""
    return sorted(((target.value.name, target.layer) for target in plan.targets), key=_rank)  # type: ignore[misc]


def _rank(target: tuple[str, int | None]) -> tuple[float, float]:
    name, layer = target
    if name in OUTPUTS:
        return float("inf"), _AFTER[name]
    if layer is None:
        return (-1.0, 0.0) if name == "token_embeddings" else (float("inf"), 0.0)
    return float(layer), float(VALUES[name].rank)


def wanted_of(rows: Sequence[Row], chosen: Sequence[tuple[int, ...]], everything: bool) -> Wanted:
    """What the engine is told of positions: a rule where there is one, else the positions by a prompt's token ids."""
    if everything:
        return (None,)
    if all(mine == (len(row) - 1,) for row, mine in zip(rows, chosen, strict=True)):
        return LAST
    wanted: dict[tuple[int, ...], Lists] = {}
    for row, mine in zip(rows, chosen, strict=True):
        wanted[row.ids] = tuple(dict.fromkeys((*wanted.get(row.ids, ()), mine)))
    return wanted


def which(wanted: Wanted, row: Row, mine: tuple[int, ...]) -> int:
    """The number of a row's positions among the lists that the engine answers for its token ids."""
    return wanted[row.ids].index(mine) if isinstance(wanted, dict) else 0


def read_pass(
    model: TracedVLLM, order: Order, wanted: Wanted, single: bool, reduce: Reduce, dtype: torch.dtype | None
) -> list[dict[str, Any]]:
    """Read values of the running pass.

    Args:
        model: The model, in a trace.
        order: What to read.
        wanted: The positions.
        single: Whether they are one position, which has no axis.
        reduce: "mean" and "sum" add up positions, in double precision; a function is given `[1, (positions,) ...]`.
        dtype: The dtype of what is returned; the value's if None.

    Returns:
        For each list of positions, value → `[layers, (positions,) ...]`, on the CPU, layers in forward order; a list
        of tensors, one for each layer, where their shapes differ.
    """
    lists: Any = wanted[tuple(model.input_ids[0].tolist())] if isinstance(wanted, dict) else wanted
    found: list[dict[str, list[torch.Tensor]]] = [{} for _ in lists]
    few = single or reduce is not None  # then one copy of all layers at the end costs less than one for each
    for name, layer in order:
        if name == "next_token_probs":
            value = model.next_token_probs
        else:
            value = model.logits if name == "logits" else read_value(model, get_label(name), layer)  # type: ignore[arg-type]
        for positions, own in zip(lists, found, strict=True):
            part = select(value[0], name == "next_token_probs" or positions, single)
            part = reduced(part, name == "next_token_probs" or single, reduce)
            part = part if isinstance(reduce, str) else part.to(dtype=dtype)
            own.setdefault(name, []).append(part if few else part.cpu())
    return [{name: together(parts) for name, parts in own.items()} for own in found]


def select(value: torch.Tensor, positions: Any, single: bool) -> torch.Tensor:
    """Positions of `[seq, ...]`; None takes all of them, and True the only row."""
    if positions is True:
        return value
    if single:
        return value[positions[0]]
    return value if positions is None else value[torch.tensor(positions, device=value.device)]


def reduced(part: torch.Tensor, single: bool, reduce: Reduce) -> torch.Tensor:
    """What is kept of the positions of one prompt, `[(positions,) ...]`."""
    if isinstance(reduce, str):
        return part.double() if single else part.double().sum(0)
    return part if reduce is None else checked(reduce(part[None]), 1)[0].detach()


def together(parts: list[torch.Tensor]) -> torch.Tensor | list[torch.Tensor]:
    """Tensors as one, on the CPU, if their shapes agree."""
    if len({part.shape for part in parts}) > 1:
        return [part.cpu() for part in parts]
    return torch.stack(parts).cpu()


def by_target(plan: Plan, taken: Iterable[dict[str, Any]]) -> dict[int, torch.Tensor]:
    """What was read of some prompts, all in the same shapes, by target: `[prompts, ...]`."""
    some = list(taken)
    whole = {name: torch.stack([one[name] for one in some]) for name, t in some[0].items() if not isinstance(t, list)}
    made: dict[int, torch.Tensor] = {}
    for t, target in enumerate(plan.targets):
        name = target.value.name
        at = 0 if target.layer is None else sorted(set(plan.layers[name])).index(target.layer)  # type: ignore[type-var]
        made[t] = whole[name][:, at] if name in whole else torch.stack([one[name][at] for one in some])
    return made


def shapes_of(taken: dict[str, Any]) -> tuple[Any, ...]:
    """The shapes of what was read of one prompt."""
    return tuple(tuple(part.shape for part in own) if isinstance(own, list) else own.shape for own in taken.values())
