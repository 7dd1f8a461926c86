"""Which share of the shards this process writes, when several processes write one dataset."""

from __future__ import annotations

import os
from typing import Any

from nnterp.arguments import count
from nnterp.named_transformer import NamedTransformer


def rank_of(given: Any) -> tuple[int, int]:
    """The number of this process and how many there are, `(rank, world size)`.

    Args:
        given: The two numbers, or None to read them from RANK and WORLD_SIZE, which `torchrun` and `accelerate launch`
            set; without these there is one process.

    Raises:
        ValueError: They are no numbers, or the rank is not below the world size.
        TypeError: `given` is no pair of integers.
    """
    if given is None:
        named = [os.environ.get(name) for name in ("RANK", "WORLD_SIZE")]
        if None in named:
            if named != [None, None]:
                raise ValueError("Of RANK and WORLD_SIZE only one is set; set both, or give rank=(rank, world size).")
            return 0, 1
        try:
            given = tuple(int(str(text)) for text in named)
        except ValueError:
            raise ValueError(f"RANK={named[0]!r} and WORLD_SIZE={named[1]!r} are no integers.") from None
    if not isinstance(given, (tuple, list)) or len(given) != 2:
        raise TypeError(f"rank is a pair, (rank, world size), such as (0, 4), not {given!r:.80}.")
    world = count(given[1], "the world size")
    return count(given[0], "rank", least=0, most=world - 1), world


def require_whole_model(model: NamedTransformer, world: int) -> None:
    """Raise if the processes hold parts of one model: then all must run the same batches, and none has a share.

    Raises:
        ValueError: The model is tensor parallel.
    """
    if world > 1 and (getattr(model._module, "tp_size", None) or 1) > 1:
        raise ValueError(
            "This model is spread over the processes (tensor parallel), so they cannot write different shards. Give "
            "each process a model of its own."
        )
