"""Cutting the cells of a sweep into batches, so that cells that begin and end at like places run together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# The unit of cost is one token in one layer. Reading a layer's weights costs as much as this many tokens, however few
# tokens run; a forward pass costs a little on top.
LAYER_OVERHEAD = {"cpu": 32}
LAYER_OVERHEAD_ELSEWHERE = 1024
PASS_OVERHEAD = 16
BANDS = (1, 2, 3, 4, 6, 8)  # numbers of bands of layers that are tried


@dataclass(frozen=True)
class Span:
    """What must run for one cell: positions from `position` up to (not including) `end`, layers from `layer` on."""

    position: int
    layer: int
    end: int


@dataclass(frozen=True)
class Tile:
    """Cells that run as the rows of one batch.

    Attributes:
        cells: Indices of the cells, in the order of `layers`.
        position: The first position that runs; those before it come from the cache.
        end: The position before which the run ends.
        layers: Per cell: the first layer that runs. All are equal if rows cannot join a running batch.
    """

    cells: tuple[int, ...]
    position: int
    end: int
    layers: tuple[int, ...]


def plan(
    spans: Sequence[Span], layers: int, most_rows: int, most_tokens: int, device: str = "cpu", join: bool = False
) -> list[Tile]:
    """Cut cells into batches, at nearly the lowest cost.

    If rows can join a running batch at their own layer, cells are cut by their positions alone; otherwise they are cut
    into bands of layers first, and each band by positions.

    Args:
        spans: What must run for each cell.
        layers: Number of layers of the model.
        most_rows, most_tokens: Bounds of a batch.
        device: Type of the device, such as "cuda"; it decides how much reading a layer's weights costs.
        join: Whether rows can join a running batch.
    """
    limits = most_rows, most_tokens
    overhead = LAYER_OVERHEAD.get(device, LAYER_OVERHEAD_ELSEWHERE)
    idle = [i for i, span in enumerate(spans) if span.layer >= layers]
    running = [i for i, span in enumerate(spans) if span.layer < layers]
    tiles = [_tile(spans, idle[k : k + most_rows], join) for k in range(0, len(idle), most_rows)]
    levels = sorted({spans[i].layer for i in running})
    cheapest: tuple[float, list[Tile]] = (float("inf"), [])
    for bands in (1,) if join else BANDS:
        if bands > max(1, len(levels)):
            break
        cost, cut = 0.0, []
        for band in range(bands):
            inside = set(levels[band * len(levels) // bands : (band + 1) * len(levels) // bands])
            chosen = [i for i in running if spans[i].layer in inside]
            own, tiled = min(
                (_cut(spans, order, layers, limits, overhead, join) for order in _orders(spans, chosen)),
                key=lambda made: made[0],
            )
            cost += own
            cut += tiled
        if cost < cheapest[0]:
            cheapest = cost, cut
    return tiles + cheapest[1]


def _orders(spans: Sequence[Span], chosen: list[int]) -> list[list[int]]:
    """Orders of cells in which neighbours have like spans: by first position, and by end if the ends differ."""
    orders = [sorted(chosen, key=lambda i: (spans[i].position, spans[i].end, spans[i].layer))]
    if len({spans[i].end for i in chosen}) > 1:
        orders.append(sorted(chosen, key=lambda i: (spans[i].end, spans[i].position, spans[i].layer)))
    return orders


def _cut(
    spans: Sequence[Span], order: list[int], layers: int, limits: tuple[int, int], overhead: int, join: bool
) -> tuple[float, list[Tile]]:
    """The cheapest cut of cells, in this order, into consecutive batches: its cost, and the batches."""
    most_rows, most_tokens = limits
    best = [0.0] + [float("inf")] * len(order)
    cut = [0] * (len(order) + 1)
    for stop in range(1, len(order) + 1):
        # Layers that run: `most` in the row with most, `total` in all rows together.
        position, end, most, total = 1 << 60, 0, 0, 0
        for start in range(stop - 1, max(-1, stop - 1 - most_rows), -1):
            span = spans[order[start]]
            run = layers - span.layer
            position, end, most, total = min(position, span.position), max(end, span.end), max(most, run), total + run
            rows, width = stop - start, end - position
            if rows * width > most_tokens and rows > 1:
                break
            passed = total if join else rows * most
            cost = best[start] + width * passed + overhead * most + PASS_OVERHEAD
            if cost < best[stop]:
                best[stop], cut[stop] = cost, start
    tiles = []
    stop = len(order)
    while stop:
        tiles.append(_tile(spans, order[cut[stop] : stop], join))
        stop = cut[stop]
    return best[-1], tiles[::-1]


def _tile(spans: Sequence[Span], members: list[int], join: bool) -> Tile:
    own = sorted(members, key=lambda i: spans[i].layer)
    starts = [spans[i].layer if join else spans[own[0]].layer for i in own]
    position, end = min(spans[i].position for i in own), max(spans[i].end for i in own)
    return Tile(tuple(own), position, end, tuple(starts))
