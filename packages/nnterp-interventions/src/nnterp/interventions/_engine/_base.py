"""The unedited runs of prompts, from which the cells of a sweep take what they share with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import nnsight
import torch

from nnterp.inputs import Row, forward_flags, given
from nnterp.interventions._engine._cache import KeysAndValues, continued_from, new_cache, stored
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
        prompts: The prompts, if nothing is left out of a cell's run: it is then given what they have beside their ids.
    """

    ids: torch.Tensor
    streams: tuple[torch.Tensor | None, ...] = ()
    cache: KeysAndValues | None = None
    prompts: tuple[Row, ...] = ()

    def given(self, which: torch.Tensor, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the model is given for rows of these prompts, by index, whose token ids stand in `ids`."""
        return given([self.prompts[i] for i in which], ids) if self.prompts else {"input_ids": ids}

    def seq(self, name: str, own: int) -> int:
        """How many positions a value has: as many as the encoder reads, or `own`, the positions that run."""
        heard = self.prompts[0].encoder if self.prompts else None
        return own if heard is None or not get_value(name).of_encoder else len(heard)


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
        return Base(ids, prompts=tuple(prompts))
    cache = new_cache(model) if needs_cache else None
    flags = forward_flags(model) if cache is None else continued_from(cache)
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
