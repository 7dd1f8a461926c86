"""Pairs of prompts of equal length in batches, and what both runs of them write."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from nnterp.errors import RemoteModelError
from nnterp.interventions._circuits._graph import Graph
from nnterp.interventions._circuits._readings import Reading, read_run
from nnterp.interventions._metrics import Bound, bind_metric, by_prompt
from nnterp.interventions._pairs import Pairs
from nnterp.interventions._running import AUTO_ROWS, BatchSize

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer

MOST_NUMBERS = 1 << 27  # of what is held of all nodes of a batch


def check_lengths(pairs: Pairs) -> None:
    """Raise unless both prompts of each pair have equally many tokens.

    Raises:
        ValueError: They have not; names the pair.
    """
    for i, (clean, corrupted) in enumerate(zip(pairs.clean, pairs.corrupted, strict=True)):
        if len(clean) != len(corrupted):
            raise ValueError(
                f"Pair {i}: the clean prompt has {len(clean)} tokens and the corrupted one {len(corrupted)}. An edge "
                "carries what was written at the same positions of the other run, so make them equally long."
            )


def refuse_remote(remote: Any, what: str) -> None:
    """Raise if a run on the remote service is asked for.

    Raises:
        RemoteModelError: It is.
    """
    if remote:
        raise RemoteModelError(
            f"{what[:-1]}remote=...) is refused: it takes heads apart beside the model, and the remote worker has no "
            "nnterp. Load the weights here. activation_patching() and path_patching() run remotely."
        )


class Chunks:
    """Pairs in batches of one length, whose size can be lowered on the way.

    Attributes:
        limit: Most pairs of a batch.
    """

    def __init__(self, model: StandardizedTransformer, graph: Graph, pairs: Pairs, batch_size: BatchSize) -> None:
        self.pairs, self.auto = pairs, batch_size == "auto"
        self.limit = AUTO_ROWS if isinstance(batch_size, str) else batch_size
        self.size = (len(graph.writers) + len(graph.inputs)) * (model.hidden_size or 1)

    def __iter__(self) -> Iterator[list[int]]:
        """Indices of the pairs of each batch, longest prompts first."""
        return self.without(())

    def without(self, done: Collection[int]) -> Iterator[list[int]]:
        """The same without some pairs."""
        left = sorted(set(range(len(self.pairs))) - set(done), key=lambda i: (-len(self.pairs.clean[i]), i))
        while left:
            width = len(self.pairs.clean[left[0]])
            most = min(self.limit, max(1, MOST_NUMBERS // (self.size * width))) if self.auto else self.limit
            chosen = [i for i in left[:most] if len(self.pairs.clean[i]) == width]
            left = left[len(chosen) :]
            yield chosen

    def halves(self, chosen: Sequence[int]) -> list[list[int]]:
        """A batch for which memory ran out, in two; later batches are no larger."""
        self.limit = max(1, len(chosen) // 2)
        return [list(chosen[: self.limit]), list(chosen[self.limit :])]


def ids_of_rows(rows: Sequence[Any]) -> torch.Tensor:
    """Token ids of prompts of one length, `[rows, seq]`."""
    return torch.tensor([row.ids for row in rows])


def both_runs(
    model: StandardizedTransformer, graph: Graph, pairs: Pairs, chosen: Sequence[int]
) -> tuple[Reading, Reading]:
    """The unedited runs of the prompts patched from and of those patched into, of some pairs."""
    with torch.no_grad():
        source, into = (
            read_run(model, graph.blocks, ids_of_rows([rows[i] for i in chosen])) for rows in (pairs.source, pairs.into)
        )
    return source, into


class Scoring:
    """The metric of runs of some pairs.

    Args:
        metric: The metric.
        model: The model.
        pairs: Number of all pairs.
        chosen: Indices of some.
        clean: Logits of their clean runs, `[chosen, vocab]`.
    """

    def __init__(
        self, metric: Any, model: StandardizedTransformer, pairs: int, chosen: Sequence[int], clean: torch.Tensor
    ) -> None:
        self.chosen = list(chosen)
        reference = clean.new_zeros(pairs, clean.shape[-1])
        reference[self.chosen] = clean.detach()
        self.bound: Bound = bind_metric(metric, model, pairs, reference)

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """The metric of logits `[chosen, vocab]`, one run of each pair: `[chosen]`."""
        return by_prompt(self.bound, logits, self.chosen)
