"""`collect` on vLLM: one block of reads is installed in the engine and runs in every request; vLLM batches these."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from nnterp.collection import Collected, positions_of
from nnterp.indices import read_index, read_indices
from nnterp.inputs import Row, encode
from nnterp.table import VALUES, get_label
from nnterp.traced import read_value
from nnterp.values import canonical
from nnterp.vllm._lens import saved

if TYPE_CHECKING:
    from nnterp.vllm._engine import TracedVLLM

OUTPUTS = {"logits": 1.0, "next_token_probs": 2.0}


def collect(
    model: TracedVLLM,
    prompts: Any,
    values: str | Iterable[str],
    layers: Any,
    positions: Any,
    device: str | torch.device,
    dtype: torch.dtype | None,
    max_new_tokens: int | None,
    settings: dict[str, Any],
) -> Collected:
    """See `StandardizedVLLM.collect`."""
    rows = encode(model, prompts)  # type: ignore[arg-type]
    asked = targets_of(model, values, layers)
    if max_new_tokens is None and settings:
        raise TypeError(f"collect() got {', '.join(settings)}, settings of a generation, which needs max_new_tokens=.")
    if max_new_tokens is not None and positions is not None:
        raise ValueError("positions is for prompts; over a generation, the positions that predict new tokens are read.")
    generating = max_new_tokens is not None
    chosen, single = positions_of(model, rows, -1 if generating else positions)  # type: ignore[arg-type]
    order = sorted(((name, layer) for name, mine in asked.items() for layer in mine), key=_rank)
    outputs = _run(model, rows, order, _tables(rows, chosen), max_new_tokens, settings)
    taken = [saved(output, "taken") for output in outputs]
    width = max(len(mine) for mine in chosen)
    mask = torch.tensor([[True] * len(mine) + [False] * (width - len(mine)) for mine in chosen])
    tensors: dict[str, Any] = {}
    for name, mine in asked.items():
        stacks = [
            _together([_row(one, name, layer, p, single, generating) for p, one in zip(chosen, taken, strict=True)])
            for layer in mine
        ]
        tensors[name] = (stacks[0] if mine == (None,) else torch.stack(stacks)).to(device=device, dtype=dtype)
    found = {name: () if mine == (None,) else mine for name, mine in asked.items()}
    new = None
    where = tuple(tuple(mine) for mine in chosen)
    done = set(range(len(rows)))
    shown = mask[:, 0] if single else mask
    if generating:
        tokens = [torch.tensor(list(output.outputs[0].token_ids)) for output in outputs]
        new = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=-1)
        shown = new >= 0
    return Collected(tensors, found, where, shown, tuple(rows), new, done, model.num_layers)  # type: ignore[arg-type]


def targets_of(model: TracedVLLM, values: Any, layers: Any) -> dict[str, tuple[int | None, ...]]:
    """Value → the layers to read it at; (None,) for a value that is not per layer.

    Raises:
        ValueError: There is no such value.
        Unavailable: A layer that was asked for does not have it.
    """
    asked: dict[str, tuple[int | None, ...]] = {}
    for name in [values] if isinstance(values, str) else list(values):
        if name in OUTPUTS:
            asked[name] = (None,)
            continue
        value, at = canonical(name)
        if not value.per_layer:
            model.place(value.name)
            asked[value.name] = (None,)
            continue
        if at is not None:
            mine: Sequence[int] = [read_index(at, model.num_layers, f"The layer of {name}", "layers")]
        elif layers is not None:
            mine = read_indices(layers, model.num_layers, "layers", "layers")
        else:
            mine = model.served.having(value.name)
        for layer in mine or range(model.num_layers):
            model.place(value.name, layer)
        asked[value.name] = tuple(dict.fromkeys((*asked.get(value.name, ()), *mine)))
    if not asked:
        raise ValueError("No values were asked for.")
    return asked


def _rank(target: tuple[str, int | None]) -> tuple[float, float]:
    name, layer = target
    if name in OUTPUTS:
        return float("inf"), OUTPUTS[name]
    if layer is None:
        return (-1.0, 0.0) if name == "token_embeddings" else (float("inf"), 0.0)
    return float(layer), float(VALUES[name].rank)


def _tables(rows: Sequence[Row], chosen: Sequence[Sequence[int]]) -> dict[tuple[int, ...], tuple[int, ...]]:
    """The token ids of each prompt → the positions whose values the engine sends back."""
    wanted: dict[tuple[int, ...], tuple[int, ...]] = {}
    for row, mine in zip(rows, chosen, strict=True):
        wanted[row.ids] = tuple(sorted({*wanted.get(row.ids, ()), *mine}))
    return wanted


def _run(
    model: TracedVLLM,
    rows: Sequence[Row],
    order: list[tuple[str, int | None]],
    wanted: dict[tuple[int, ...], tuple[int, ...]],
    max_new_tokens: int | None,
    settings: dict[str, Any],
) -> list[Any]:
    last = all(mine == (len(ids) - 1,) for ids, mine in wanted.items())
    sent = None if last else wanted
    taken: Any
    if max_new_tokens is None:
        with model.edit() as (_, edit):
            taken = read_pass(model, order, sent)
            taken.save()  # type: ignore[attr-defined]  # every object has it in a trace
    else:
        with model.edit() as (tracer, edit):
            taken = []
            taken.save()  # type: ignore[attr-defined]
            for _ in tracer.iter[:]:
                taken.append(read_pass(model, order, None))
    try:
        return model.run([row.ids for row in rows], max_new_tokens or 1, **settings)
    finally:
        edit.clear()


def read_pass(
    model: TracedVLLM,
    order: list[tuple[str, int | None]],
    wanted: dict[tuple[int, ...], tuple[int, ...]] | None,
) -> dict[tuple[str, int | None], Any]:
    """Read values of the running pass, in forward order.

    Args:
        model: The model, in a trace.
        order: (value, layer) pairs, in the order in which the model computes them.
        wanted: The token ids of a prompt → the positions to keep; the last one alone if None.

    Returns:
        (value, layer) → (positions, `[positions, ...]`), on the CPU; for `next_token_probs`, `[vocab]` alone.
    """
    positions: tuple[int, ...] = (-1,)
    if wanted is not None:
        positions = wanted[tuple(model.input_ids[0].tolist())]
    index = torch.tensor(positions)
    taken: dict[tuple[str, int | None], Any] = {}
    for name, layer in order:
        if name == "next_token_probs":
            taken[name, layer] = model.next_token_probs[0].cpu()
            continue
        value = model.logits if name == "logits" else read_value(model, get_label(name), layer)  # type: ignore[arg-type]
        taken[name, layer] = positions, value[0][index.to(value.device)].cpu()
    return taken


def _row(taken: Any, name: str, layer: int | None, mine: Sequence[int], single: bool, generating: bool) -> torch.Tensor:
    if generating:
        every = [one[name, layer] for one in taken if (name, layer) in one]
        return torch.stack([one if name == "next_token_probs" else one[1][0] for one in every])
    if name == "next_token_probs":
        return taken[name, layer]
    positions, tensor = taken[name, layer]
    where = [0] if positions == (-1,) else [positions.index(p) for p in mine]
    return tensor[where[0]] if single else tensor[where]


def _together(rows: list[torch.Tensor]) -> torch.Tensor:
    """Rows as one tensor; shorter ones, of which some generated fewer tokens, are filled up with 0."""
    if len({row.shape for row in rows}) == 1:
        return torch.stack(rows)
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
