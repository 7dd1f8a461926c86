"""How the cells of a sweep are cut into batches: rows that share a prefix of positions and of layers run together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# Costs are counted in tokens passing one layer. A layer costs as much for a few tokens as for some number of them (the
# floor), since its weights have to be read; each layer and each forward pass costs a little on top.
FLOORS = {"cpu": 16}
FLOOR_ELSEWHERE = 1024
LAYER_OVERHEAD = 2
PASS_OVERHEAD = 48


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
    """The cheapest way of cutting cells, sorted by where they begin, into batches.

    Args:
        begins: For each cell the first position and the first layer that differ from the unedited run.
        length: Positions of the prompt.
        layers: Layers of the model.
        most_rows, most_tokens: Bounds of a batch.
        device: Kind of device, which decides how many tokens a layer costs at least.
    """
    order = sorted(range(len(begins)), key=lambda i: begins[i])
    floor = FLOORS.get(device, FLOOR_ELSEWHERE)
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
            cost = best[start] + ((max(tokens, floor) + LAYER_OVERHEAD) * run + PASS_OVERHEAD if run else 1)
            if cost < best[end]:
                best[end], cut[end] = cost, start
    tiles = []
    end = len(order)
    while end:
        chosen = order[cut[end] : end]
        tiles.append(Tile(tuple(chosen), min(begins[i][0] for i in chosen), min(begins[i][1] for i in chosen)))
        end = cut[end]
    return tiles[::-1]
