"""When a forward pass comes by what a block reads."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from nnterp.errors import Unavailable
from nnterp.named_transformer import NamedTransformer
from nnterp.table import VALUES
from nnterp.traced_block._reads import FIRST, Index, Read
from nnterp.values import reads, stack_depth, when

Span = tuple[float, float]  # when the first and the last tensor of a value are computed


def by_table(name: str, layer: Index, count: int) -> tuple[float, float]:
    """Where a value comes in the order that most models have: its layer, and its rank in the layer."""
    if name in FIRST:
        return -2, 0
    value = VALUES[name]
    if value.stack in ("vision", "encoder"):  # the tower and the encoder run before the layers of the stream
        return -1, (layer if isinstance(layer, int) and value.per_layer else 999) + value.rank / 10
    if not value.per_layer:
        return (-1 if value.rank < 1 else count), value.rank
    index = layer[0] if isinstance(layer, tuple) else layer or 0
    return index % count if -count <= index < count else index, value.rank


def by_probe(model: NamedTransformer, read: Read) -> Span:
    """When a forward pass of this model computes a value, on the clock of the probe that looked into it.

    Raises:
        Unavailable: The model does not have the value.
        KeyError: The probe never reached it.
    """
    if read.name in FIRST:
        return -2, -2
    if VALUES[read.name].stack == "vision":
        raise Unavailable("The probe is a text.")
    if not VALUES[read.name].per_layer:
        return (-1, -1) if VALUES[read.name].rank < 1 else (math.inf, math.inf)
    layer = read.layer
    if isinstance(layer, int):
        layer %= stack_depth(model.facts, VALUES[read.name])
    # A state is put together from what enters the mixer and what its code returns.
    names = ("mixers_input", "mixers_output") if read.name == "mixer_states" else (read.name,)
    pieces = [piece for name in names for piece in reads(model, model.place(name, layer))[0]]
    ticks = [when(model, piece) for piece in pieces]
    return min(ticks), max(ticks)


def in_table_order(model: NamedTransformer, found: Sequence[Read]) -> bool:
    """Whether reads stand in the order of the table. It needs no look into the model."""
    keys = [by_table(read.name, read.layer, model.num_layers) for read in found]
    return all(a <= b for a, b in itertools.pairwise(keys))


def sorted_reads(model: NamedTransformer, found: Sequence[Read]) -> list[Read] | None:
    """Different reads in the order of the forward pass.

    None if they stand in that order, or if there is none: a value is missing, or two are made of tensors that the pass
    computes in turns.
    """
    different = list({(read.name, read.layer): read for read in reversed(found)}.values())[::-1]
    try:
        spans = {id(read): by_probe(model, read) for read in different}
    except (Unavailable, KeyError, IndexError, TypeError):
        return None
    ordered = sorted(different, key=lambda read: spans[id(read)])
    if ordered == different:
        return None
    apart = all(spans[id(a)][1] <= spans[id(b)][0] for a, b in itertools.pairwise(ordered))
    return ordered if apart else None
