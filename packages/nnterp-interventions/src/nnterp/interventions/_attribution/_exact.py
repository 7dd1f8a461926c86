"""The exact effects of some cells of a grid: runs with the activation patched, as activation patching makes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from nnterp.interventions._attribution._pairs_run import Known
from nnterp.interventions._engine import Cell, Shortcuts, sweep
from nnterp.interventions._grid import Grid
from nnterp.interventions._metrics import bind_some, scored
from nnterp.interventions._running import BatchSize
from nnterp.interventions._states import states_of

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer

PAIRS = 8  # pairs of prompts whose activations are held at a time


def exact_effects(
    model: StandardizedTransformer,
    grid: Grid,
    metric: Any,
    indices: list[int],
    shortcuts: Shortcuts,
    batch_size: BatchSize,
    known: Mapping[int, Known],
) -> torch.Tensor:
    """The metric of each patched run minus that of the run patched into, float32 `[cells]` on the CPU.

    Args:
        model: The model.
        grid: The grid of all cells.
        metric: The metric.
        indices: The cells, as indices of the flat `[pairs, values, layers, heads, positions]`.
        shortcuts: Those proven for the model.
        batch_size: Rows of a batch.
        known: The unedited runs of some pairs, which are not run again.
    """
    shape = (len(grid.pairs), *grid.shape)
    of_pair: dict[int, list[tuple[int, tuple[int, ...]]]] = {}
    for place, index in enumerate(indices):
        pair, *rest = (int(i) for i in torch.unravel_index(torch.tensor(index), shape))
        of_pair.setdefault(pair, []).append((place, tuple(rest)))
    effects = torch.full((len(indices),), torch.nan)
    pairs = sorted(of_pair)
    for start in range(0, len(pairs), PAIRS):
        some = pairs[start : start + PAIRS]
        own = [(k, place, *where) for k, i in enumerate(some) for place, where in of_pair[i]]
        keys = list(dict.fromkeys((grid.names[v], grid.layers[a]) for _, _, v, a, _, _ in own))
        into, source = ([rows[i] for i in some] for rows in (grid.pairs.into, grid.pairs.source))
        ran = [known[i] for i in some if i in known]
        if len(ran) == len(some):
            states, logits = [run.states for run in ran], torch.stack([run.source_logits for run in ran])
            clean = logits if grid.pairs.denoising else torch.stack([run.into_logits for run in ran])
            streams = [run.streams for run in ran]
        else:
            states, logits = states_of(model, source, keys, shortcuts)
            clean = logits if grid.pairs.denoising else states_of(model, into, [], shortcuts)[1]
            streams = []
        bound = bind_some(metric, model, len(grid.pairs), clean, some)
        columns = [grid.differing(i, shortcuts) for i in some]
        cells = [Cell(k, ()) for k in range(len(some))]
        for k, _, v, a, b, c in own:
            cells.append(grid.cell(k, (grid.names[v], grid.layers[a]), grid.units[b], columns[k][c], states[k]))
        options: dict[str, Any] = {"batch_size": batch_size, "progress": False, "streams": streams}
        found = sweep(model, into, cells, scored(bound, cells), shortcuts, tokens=bound.tokens, **options)["scores"]
        for (k, place, *_), score in zip(own, found[len(some) :], strict=True):
            effects[place] = score - found[k]
    return effects
