"""Running prompts through a model in batches: sizes chosen, halved when memory runs out, with a progress bar."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from loguru import logger
from tqdm.auto import tqdm

from nnterp.inputs import Batch, Row, pad

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer

BatchSize = int | Literal["auto"]
AUTO_TOKENS = 8192  # tokens a batch of whole prompts may have when its size is left to us
AUTO_ROWS = 64


def forward_flags(model: StandardizedTransformer) -> dict[str, Any]:
    """Keywords for a forward pass that is not going to be continued."""
    accepts = inspect.signature(model._module.forward).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in accepts.values())
    return {"use_cache": False} if "use_cache" in accepts or open_ended else {}


def filled(rows: Sequence[Row]) -> torch.Tensor:
    """Token ids of prompts, `[prompts, seq]`; the shorter ones go on with their last token."""
    width = max(len(row) for row in rows)
    return torch.tensor([row.ids + row.ids[-1:] * (width - len(row)) for row in rows])


def check_batch_size(batch_size: BatchSize) -> None:
    """Raise unless it is "auto" or positive.

    Raises:
        ValueError: It is neither.
    """
    if batch_size != "auto" and (not isinstance(batch_size, int) or batch_size < 1):
        raise ValueError(f'batch_size is "auto" or a positive integer, not {batch_size!r}.')


def in_batches(
    model: StandardizedTransformer,
    rows: Sequence[Row],
    batch_size: BatchSize,
    step: Callable[[Batch], None],
    what: str,
    progress: bool | None,
) -> None:
    """Call `step` on every row, in batches of like length, longest first.

    Rows of different lengths share a batch only where the model is exact under padding. When memory runs out, the batch
    is halved and tried again; what is done is kept.

    Raises:
        ValueError: `batch_size` is neither "auto" nor positive.
        torch.OutOfMemoryError: A single prompt does not fit.
    """
    check_batch_size(batch_size)
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i]), i))
    limit = len(rows) if batch_size == "auto" else batch_size
    start = 0
    with bar(len(rows), what, progress) as shown:
        while start < len(order):
            width = len(rows[order[start]])
            size = min(limit, max(1, AUTO_TOKENS // width), AUTO_ROWS) if batch_size == "auto" else limit
            chosen = order[start : start + size]
            if not model.padding_is_exact:
                chosen = [i for i in chosen if len(rows[i]) == width]
            batch = pad(model, [rows[i] for i in chosen], tuple(chosen))
            if not within_memory(partial(step, batch), len(chosen)):
                limit = max(1, len(chosen) // 2)
                continue
            start += len(chosen)
            shown.update(len(chosen))


def within_memory(run: Callable[[], None], rows: int) -> bool:
    """Run, and say whether memory sufficed; a single row that does not fit raises."""
    try:
        run()
        return True
    except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
        if rows == 1 or not is_out_of_memory(error):
            raise
        logger.warning("out of memory with {} rows, going on with half as many", rows)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return False


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, in any of torch's ways."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return "out of memory" in text or "can't allocate memory" in text


def bar(total: int, what: str, progress: bool | None) -> Any:
    """A progress bar; with None, only if the work lasts."""
    if progress is None:
        return tqdm(total=total, desc=what, delay=2.0, leave=False)
    return tqdm(total=total, desc=what, disable=not progress)
