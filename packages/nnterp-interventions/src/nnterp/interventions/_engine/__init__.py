"""The sweep engine: runs one prompt's forward pass many times over, each time with other edits, as rows of batches.

A cell is one prompt with some edits, and a row is a row of a batch of cells. What a cell shares with its prompt's
unedited run is not computed again, as far as the `Shortcuts` passed in allow it. The engine does not know which
shortcuts are exact for a model; `nnterp.interventions._proving` finds that out by running it.
"""

from nnterp.interventions._engine._batch import Reduce
from nnterp.interventions._engine._cache import new_cache
from nnterp.interventions._engine._edits import (
    POSITION_AXES,
    UNIT_AXES,
    At,
    Cell,
    Edit,
    Key,
    axes_of,
    index_of,
    label_of,
    layer_of,
    positions_axis,
    rows_of,
    units_axis,
)
from nnterp.interventions._engine._kept import Kept
from nnterp.interventions._engine._passing import Passing, Step, forward_order, forward_steps
from nnterp.interventions._engine._shortcuts import Shortcuts
from nnterp.interventions._engine._sweep import sweep

__all__ = [
    "POSITION_AXES",
    "UNIT_AXES",
    "At",
    "Cell",
    "Edit",
    "Kept",
    "Key",
    "Passing",
    "Reduce",
    "Shortcuts",
    "Step",
    "axes_of",
    "forward_order",
    "forward_steps",
    "index_of",
    "label_of",
    "layer_of",
    "new_cache",
    "positions_axis",
    "rows_of",
    "sweep",
    "units_axis",
]
