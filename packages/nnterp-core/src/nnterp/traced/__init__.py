"""Everything that travels to a remote worker: the traced half of a model, its places, accessors, readout and edits.

nnsight sends the functions and classes that a traced block mentions, and what these mention. This package therefore
imports only the ground floor of nnterp (`errors`, `record`, `selectors`, `table`,
`tensors`, `devices`), and everything in it has
source: records instead of dataclasses, no decorators that wrap. `tests/core/test_house.py` holds the imports,
`tests/remote` weighs the requests.
"""

from nnterp.traced._accessors import (
    LayerAccessor,
    ModuleListAccessor,
    layer_index,
    read_value,
    require_running,
    write_value,
)
from nnterp.traced._apart import Apart, is_apart
from nnterp.traced._binding import bind_names, envoy_at
from nnterp.traced._bracketing import bracket_one
from nnterp.traced._conditions import Chosen, Condition
from nnterp.traced._dictionary import (
    Activation,
    ConstantNorm,
    CrossLayerTranscoder,
    Dictionary,
    Gated,
    GroupMax,
    JumpRelu,
    Scaling,
    TopK,
    UnitVariance,
)
from nnterp.traced._directory import LAYER, Directory
from nnterp.traced._edited_later import EditedLater, SumEditedLater
from nnterp.traced._edits import Edits, NoEdits
from nnterp.traced._experts import EveryExpert, Experts, Given, Routed, counted, one_column
from nnterp.traced._features import Attached, Features, listed
from nnterp.traced._layouts import PARTS, PROMPTED, PROMPTED_QUERIES, Layout, StreamLayout
from nnterp.traced._places import Declared, Everywhere, Inside, Item, ReadOnly, Site, bare
from nnterp.traced._readout import Chain, Readout, Way, project_on_vocab
from nnterp.traced._running import Lender, Place, Running
from nnterp.traced._runs import InRun, Runs
from nnterp.traced._sharing import Sharing, fresh_rotations, require_sharing
from nnterp.traced._skipping import skip_layers
from nnterp.traced._states import CachedState, State
from nnterp.traced._steering import Steering, change, steer, steering_of
from nnterp.traced._steps import StepTracer
from nnterp.traced._sums import Sum, added
from nnterp.traced._through_out import ThroughOut
from nnterp.traced._transformer import TracedTransformer, accessor, arriving, travel_by_value
from nnterp.traced._views import View, over

__all__ = [
    "LAYER",
    "PARTS",
    "PROMPTED",
    "PROMPTED_QUERIES",
    "Activation",
    "Apart",
    "Attached",
    "CachedState",
    "Chain",
    "Chosen",
    "Condition",
    "ConstantNorm",
    "CrossLayerTranscoder",
    "Declared",
    "Dictionary",
    "Directory",
    "EditedLater",
    "Edits",
    "EveryExpert",
    "Everywhere",
    "Experts",
    "Features",
    "Gated",
    "Given",
    "GroupMax",
    "InRun",
    "Inside",
    "Item",
    "JumpRelu",
    "LayerAccessor",
    "Layout",
    "Lender",
    "ModuleListAccessor",
    "NoEdits",
    "Place",
    "ReadOnly",
    "Readout",
    "Routed",
    "Running",
    "Runs",
    "Scaling",
    "Sharing",
    "Site",
    "State",
    "Steering",
    "StepTracer",
    "StreamLayout",
    "Sum",
    "SumEditedLater",
    "ThroughOut",
    "TopK",
    "TracedTransformer",
    "UnitVariance",
    "View",
    "Way",
    "accessor",
    "added",
    "arriving",
    "bare",
    "bind_names",
    "bracket_one",
    "change",
    "counted",
    "envoy_at",
    "fresh_rotations",
    "is_apart",
    "layer_index",
    "listed",
    "one_column",
    "over",
    "project_on_vocab",
    "read_value",
    "require_running",
    "require_sharing",
    "skip_layers",
    "steer",
    "steering_of",
    "travel_by_value",
    "write_value",
]
