"""Read values of many prompts in one pass, in batches, stopping after the last layer needed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from nnterp.arguments import check_dtype, count, device_of
from nnterp.collection._collected import Collected
from nnterp.collection._filling import Filling, still_to_run
from nnterp.collection._generation import over_generation
from nnterp.collection._pass import read_batch
from nnterp.collection._plan import Plan, make_plan
from nnterp.collection._reduce import Reduce, check_reduce
from nnterp.defaults import plain_defaults
from nnterp.errors import Unavailable
from nnterp.indices import Indices
from nnterp.inputs import Row, all_images, batches, encode, left_padded
from nnterp.named_transformer import NamedTransformer
from nnterp.positions import is_one_position, per_prompt, plain_positions, resolve
from nnterp.progress import bar, check_progress
from nnterp.resuming import Call


@plain_defaults()
def collect(
    model: NamedTransformer,
    prompts: Any,
    values: str | Iterable[str],
    layers: Indices = None,
    positions: Any = None,
    batch_size: int = 16,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    reduce: Reduce = None,
    progress: bool | None = None,
    max_new_tokens: int | None = None,
    remote: Any = False,
    resume: Collected | str | Path | None = None,
    **generation: Any,
) -> Collected:
    """See `StandardizedTransformer.collect`.

    Returns:
        As that method.

    Raises:
        TypeError: A setting of a generation was given without `max_new_tokens`.
    """
    model.require_no_trace("collect()")
    model.prepare(remote)
    device, batch_size = device_of(device), count(batch_size, "batch_size")
    check_dtype(dtype)
    check_progress(progress)
    check_reduce(reduce)
    rows = encode(model, prompts, images=max_new_tokens is None)
    if max_new_tokens is None and generation:
        raise TypeError(
            f"collect() got {', '.join(generation)}; these are settings of a generation, which needs max_new_tokens=."
        )
    if max_new_tokens is not None:
        _check_generation(model, remote, positions)
    plan = make_plan(model, values, layers, outputs=True, images=all_images(model, rows))
    seen = own_rows(rows, plan)
    chosen, single = positions_of(model, seen, -1 if max_new_tokens is not None else positions)
    asked = {
        "values": [target.label for target in plan.targets],
        "prompts": [row.identity for row in rows],
        "positions": (chosen, single),
        "dtype": dtype,
        "max_new_tokens": max_new_tokens,
        "generation": {name: value for name, value in generation.items() if not callable(value)},
    }
    call = Call(model, "collect", asked, {"reduce": reduce}, also="collected")
    earlier = None if resume is None else resumed(call, resume)
    if max_new_tokens is not None:
        settings = (batch_size, device, dtype, reduce, progress, max_new_tokens, generation)
        return over_generation(model, rows, plan, *settings, call, earlier)
    result = Filling(plan, seen, chosen, single, device, dtype, reduce, model.readout.layout.extra)
    if earlier is not None:
        result.take_over(earlier)
    with (
        left_padded(model.tokenizer),
        bar(len(rows), "collect", progress, "prompt") as shown,
        call.keeping(lambda: result.collected(model.num_layers, call.record) if result.done else None),
    ):
        for batch in batches(model, rows, batch_size):
            left = still_to_run(model, batch, result.done)
            if left is not None:
                taken = read_batch(model, plan, left, result.pick(left), result.device, dtype, reduce, remote)
                result.put(left.indices, taken)
            shown.update(len(batch))
    return result.collected(model.num_layers)


def own_rows(rows: Sequence[Row], plan: Plan) -> list[Row]:
    """The rows whose positions the values of a plan have: the prompts, or what the encoder reads of them."""
    return [row.encoder for row in rows if row.encoder is not None] if plan.of_encoder else list(rows)


def _check_generation(model: NamedTransformer, remote: Any, positions: Any) -> None:
    """Raise for arguments that do not go with a generation.

    Raises:
        ValueError: There are such arguments.
        Unavailable: The model reads two inputs: its batches are padded on the right, where a generation goes on.
    """
    if model.num_encoder_layers:
        raise Unavailable(
            f"collect(max_new_tokens=...) does not serve {model.model_class}, which reads two inputs. Generate first, "
            "and collect the values of EncoderDecoderPrompt(text, decoder=ids), ids being all that was generated."
        )
    if remote:
        raise ValueError(
            "collect() over a generation does not run remotely. Generate first, and collect the values of the "
            "whole text: prompts and what was generated, as token ids."
        )
    if positions is not None:
        raise ValueError(
            "positions is for prompts; over a generation, the positions that predicted the new tokens are read."
        )


def resumed(call: Call, resume: Collected | str | Path) -> Collected:
    """Find the partial result that a call goes on from; returns it, read from its file if need be.

    Raises:
        ValueError: It is of another call, or complete.
        FileNotFoundError: There is no such file.
    """
    earlier = resume if isinstance(resume, Collected) else Collected.load(resume)
    call.check(earlier.run, "what was given as resume" if isinstance(resume, Collected) else str(resume))
    return earlier


def positions_of(model: NamedTransformer, rows: Sequence[Row], positions: Any) -> tuple[list[tuple[int, ...]], bool]:
    """Resolve the positions asked for.

    Returns:
        For each row its positions, and whether they are one position, which has no axis.

    Raises:
        IndexError, ValueError: A row has no such position; names the row, its length and its tokens.
        TypeError: It is no position.
    """
    plain = plain_positions(positions)
    each = per_prompt(plain, len(rows))
    chosen = [resolve(model, row, mine, f"Prompt {i}") for i, (row, mine) in enumerate(zip(rows, each, strict=True))]
    return chosen, is_one_position(plain)
