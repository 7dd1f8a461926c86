"""How the cells of a sweep are cut into batches: rows that share a prefix of positions and of layers run together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# Costs are counted in tokens passing one layer. A layer's weights have to be read however few tokens pass it, which
# costs as much as some more tokens; a forward pass costs a little on top.
LAYER_OVERHEAD = {"cpu": 32}
LAYER_OVERHEAD_ELSEWHERE = 1024
PASS_OVERHEAD = 16
BANDS = (1, 2, 3, 4, 6, 8)  # into how many bands of layers cells are tried to be cut


@dataclass(frozen=True)
class Span:
    """What has to run for one cell: positions from `position` up to (not including) `end`, layers from `layer` on."""

    position: int
    layer: int
    end: int


@dataclass(frozen=True)
class Tile:
    """Cells that run as the rows of one batch.

    Attributes:
        cells: Their indices, in the order of the layers that they begin at.
        position: The first position that runs; those before it come from the cache.
        end: The position before which the run ends.
        layers: For each cell the first layer that runs; all alike where rows cannot join on the way.
    """

    cells: tuple[int, ...]
    position: int
    end: int
    layers: tuple[int, ...]


def plan(
    spans: Sequence[Span], layers: int, most_rows: int, most_tokens: int, device: str = "cpu", join: bool = False
) -> list[Tile]:
    """A cheap way of cutting cells into batches.

    Rows that may join a running batch at their own layer are cut along the positions alone; otherwise into bands of
    layers, and each of these along the positions.

    Args:
        spans: What has to run for each cell.
        layers: Layers of the model.
        most_rows, most_tokens: Bounds of a batch.
        device: Kind of device, which decides how much a layer costs besides its tokens.
        join: Whether rows may join.
    """
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
                (
                    _cut(spans, order, layers, most_rows, most_tokens, overhead, join)
                    for order in _orders(spans, chosen)
                ),
                key=lambda made: made[0],
            )
            cost += own
            cut += tiled
        if cost < cheapest[0]:
            cheapest = cost, cut
    return tiles + cheapest[1]


def _orders(spans: Sequence[Span], chosen: list[int]) -> list[list[int]]:
    """Orders in which neighbours are alike; prompts of different lengths end differently."""
    orders = [sorted(chosen, key=lambda i: (spans[i].position, spans[i].end, spans[i].layer))]
    if len({spans[i].end for i in chosen}) > 1:
        orders.append(sorted(chosen, key=lambda i: (spans[i].end, spans[i].position, spans[i].layer)))
    return orders


def _cut(
    spans: Sequence[Span],
    order: list[int],
    layers: int,
    most_rows: int,
    most_tokens: int,
    overhead: int,
    join: bool,
) -> tuple[float, list[Tile]]:
    """The cheapest cut of cells in a given order into consecutive batches, with its cost."""
    best = [0.0] + [float("inf")] * len(order)
    cut = [0] * (len(order) + 1)
    for stop in range(1, len(order) + 1):
        position, end, most, total = 1 << 60, 0, 0, 0  # layers that run: in the row with most, in all rows together
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
