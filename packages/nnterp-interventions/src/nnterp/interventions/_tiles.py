"""How the cells of a sweep are cut into batches: rows that share a prefix of positions and of layers run together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# Costs are counted in tokens passing one layer. A layer's weights have to be read however few tokens pass it, which
# costs as much as some more tokens; a forward pass costs a little on top.
LAYER_OVERHEAD = {"cpu": 13}
LAYER_OVERHEAD_ELSEWHERE = 1024
PASS_OVERHEAD = 16
BANDS = (1, 2, 3, 4, 6, 8)  # into how many bands of layers cells are tried to be cut


@dataclass(frozen=True)
class Tile:
    """Cells that run as the rows of one batch, from a position and a layer on.

    Attributes:
        cells: Their indices.
        position: The first position that runs; those before it come from the cache.
        layer: The first layer that runs.
    """

    cells: tuple[int, ...]
    position: int
    layer: int


def plan(
    begins: Sequence[tuple[int, int]], length: int, layers: int, most_rows: int, most_tokens: int, device: str = "cpu"
) -> list[Tile]:
    """A cheap way of cutting cells into batches: bands of layers, and in each the best cut along the positions.

    Args:
        begins: For each cell the first position and the first layer that differ from the unedited run.
        length: Positions of the prompt.
        layers: Layers of the model.
        most_rows, most_tokens: Bounds of a batch.
        device: Kind of device, which decides how much a layer costs besides its tokens.
    """
    overhead = LAYER_OVERHEAD.get(device, LAYER_OVERHEAD_ELSEWHERE)
    levels = sorted({layer for _, layer in begins})
    cheapest: tuple[float, list[Tile]] = (float("inf"), [])
    for bands in BANDS:
        if bands > max(1, len(levels)):
            break
        cost, tiles = 0.0, []
        for band in range(bands):
            inside = set(levels[band * len(levels) // bands : (band + 1) * len(levels) // bands])
            chosen = [i for i, (_, layer) in enumerate(begins) if layer in inside]
            own, cut = _cut(begins, chosen, length, layers, most_rows, most_tokens, overhead)
            cost += own
            tiles += cut
        if cost < cheapest[0]:
            cheapest = cost, tiles
    return cheapest[1]


def _cut(
    begins: Sequence[tuple[int, int]],
    chosen: list[int],
    length: int,
    layers: int,
    most_rows: int,
    most_tokens: int,
    overhead: int,
) -> tuple[float, list[Tile]]:
    """The cheapest cut of some cells, sorted by where they begin, into consecutive batches, with its cost."""
    order = sorted(chosen, key=lambda i: begins[i])
    best = [0.0] + [float("inf")] * len(order)
    cut = [0] * (len(order) + 1)
    for end in range(1, len(order) + 1):
        layer = layers
        for start in range(end - 1, max(-1, end - 1 - most_rows), -1):
            position, own = begins[order[start]]
            layer = min(layer, own)
            tokens = (end - start) * (length - position)
            if tokens > most_tokens and end - start > 1:
                break
            run = layers - layer
            cost = best[start] + ((tokens + overhead) * run + PASS_OVERHEAD if run else 1)
            if cost < best[end]:
                best[end], cut[end] = cost, start
    tiles = []
    end = len(order)
    while end:
        members = order[cut[end] : end]
        tiles.append(Tile(tuple(members), min(begins[i][0] for i in members), min(begins[i][1] for i in members)))
        end = cut[end]
    return best[-1], tiles[::-1]
