"""Running prompts through a model in batches: sizes chosen, halved when memory runs out, with a progress bar."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch

from nnterp.arguments import count
from nnterp.discovery import require_gradients
from nnterp.inputs import Batch, Row, by_length, pad, sharing_first
from nnterp.progress import bar
from nnterp.warn import warn

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer

BatchSize: TypeAlias = int | Literal["auto"]
AUTO_TOKENS = 8192  # most tokens of a batch of whole prompts whose size is "auto"
AUTO_ROWS = 64


def filled(prompts: Sequence[Row]) -> torch.Tensor:
    """Token ids of prompts, `[prompts, seq]`, int64; shorter prompts repeat their last token on the right."""
    width = max(len(prompt) for prompt in prompts)
    return torch.tensor([prompt.ids + prompt.ids[-1:] * (width - len(prompt)) for prompt in prompts])


def check_batch_size(batch_size: BatchSize) -> None:
    """Raise unless it is "auto" or positive.

    Raises:
        ValueError: It is neither.
    """
    if isinstance(batch_size, str) and batch_size == "auto":
        return
    try:
        count(batch_size, "batch_size")
    except (TypeError, ValueError):
        raise ValueError(f'batch_size is "auto" or a positive integer, not {batch_size!r:.80}.') from None


def in_batches(
    model: StandardizedTransformer,
    prompts: Sequence[Row],
    batch_size: BatchSize,
    step: Callable[[Batch], None],
    what: str,
    progress: bool | None,
) -> None:
    """Call `step` on all prompts, in batches of like length, longest first.

    Prompts share a batch only if each gives in it what it gives alone (`model.sharing`). When memory runs out, the
    batch is halved and run again; finished batches are not.

    Raises:
        ValueError: `batch_size` is neither "auto" nor positive.
        torch.OutOfMemoryError: A single prompt does not fit.
    """
    check_batch_size(batch_size)
    order = by_length(prompts)
    limit = len(prompts) if batch_size == "auto" else batch_size
    start = 0
    with bar(len(prompts), what, progress) as shown:
        while start < len(order):
            width = len(prompts[order[start]])
            size = min(limit, max(1, AUTO_TOKENS // width), AUTO_ROWS) if batch_size == "auto" else limit
            chosen = sharing_first(model, prompts, order[start : start + size])
            batch = pad(model, [prompts[i] for i in chosen], tuple(chosen))
            if not within_memory(partial(step, batch), len(chosen)):
                limit = max(1, len(chosen) // 2)
                continue
            start += len(chosen)
            shown.update(len(chosen))


def within_memory(run: Callable[[], None], rows: int) -> bool:
    """Call `run`, a batch of `rows` rows; False if memory ran out, which raises if there was only one row."""
    try:
        run()
        return True
    except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
        if rows == 1 or not is_out_of_memory(error):
            raise
        warn(
            f"Memory ran out with {rows} rows in a batch; going on with {max(1, rows // 2)}. Pass batch_size="
            f"{max(1, rows // 2)} to save the failed attempt."
        )
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return False


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, in any of torch's wordings."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return "out of memory" in text or "can't allocate memory" in text


@contextlib.contextmanager
def weights_at_rest(module: torch.nn.Module) -> Iterator[None]:
    """No parameter takes part in gradients inside the block.

    Raises:
        Unavailable: The module is quantised in a way that hands on no gradients.
    """
    require_gradients(module)
    learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
