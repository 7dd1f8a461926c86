"""The unedited runs of prompts, from which the cells of a sweep take what they share with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import nnsight
import torch

from nnterp.images import Images
from nnterp.inputs import Row, forward_flags
from nnterp.interventions._engine._cache import KeysAndValues, new_cache, stored
from nnterp.interventions._running import filled
from nnterp.values import get_value, read_value

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer


@dataclass(frozen=True)
class Base:
    """Unedited runs of some prompts, as far as cells need them. Shorter prompts are filled up on the right.

    Attributes:
        ids: `[prompts, seq]`.
        streams: The residual stream entering each layer and leaving the last, `[prompts, seq, hidden]` each; empty if
            no layer is skipped. The first is None if no row begins at layer 0 of a running batch.
        cache: Keys and values of each layer; None if no prefix is shared.
        images: Of the one prompt, if it has any; nothing is then left out of a cell's run.
    """

    ids: torch.Tensor
    streams: tuple[torch.Tensor | None, ...] = ()
    cache: KeysAndValues | None = None
    images: Images | None = None


def base_of(prompts: Sequence[Row], streams: Sequence[Sequence[torch.Tensor]]) -> Base:
    """The unedited runs of prompts whose streams are there.

    Args:
        prompts: The prompts.
        streams: For each the stream entering each layer and leaving the last, `[seq, hidden]` each. Shorter prompts are
            filled up with what they end with, which nothing reads.
    """
    ids = filled(prompts)
    width = ids.shape[1]
    by_layer = zip(*([_widened(stream, width) for stream in own] for own in streams), strict=True)
    return Base(ids, tuple(torch.stack(layer) for layer in by_layer))


def _widened(stream: torch.Tensor, width: int) -> torch.Tensor:
    return torch.cat([stream, stream[-1:].expand(width - len(stream), -1)])


def run_base(
    model: StandardizedTransformer,
    prompts: Sequence[Row],
    needs_streams: bool = False,
    needs_cache: bool = False,
    needs_first: bool = False,
) -> Base:
    """Run prompts without edits, in one forward pass up to the last layer; none if nothing of it is needed.

    Args:
        model: The model.
        prompts: The prompts.
        needs_streams: Keep the residual stream leaving each layer.
        needs_cache: Keep the keys and values.
        needs_first: With `needs_streams`, also keep the stream entering the first layer.
    """
    ids = filled(prompts)
    if not needs_streams and not needs_cache:
        return Base(ids, images=prompts[0].images)
    cache = new_cache(model) if needs_cache else None
    flags = forward_flags(model) if cache is None else {"past_key_values": cache, "use_cache": True}
    value, layers = get_value("layers_output"), model.num_layers
    with model.trace({"input_ids": ids}, **flags) as tracer:
        streams = []
        if needs_streams:
            streams.append(read_value(model, get_value("layers_input"), 0) if needs_first else None)
        for layer in range(layers):
            stream = read_value(model, value, layer)
            if needs_streams:
                streams.append(stream)
        nnsight.save(streams)
        tracer.stop()
    return Base(ids, tuple(streams), None if cache is None else stored(cache))
