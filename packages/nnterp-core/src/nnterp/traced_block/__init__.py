"""The source of a `with model.trace(...)` block: its reads in forward order, where it only reads.

nnsight runs a block beside the forward pass, so a value that the pass has left behind cannot be read any more. What a
block reads at constant indices stands in its source, so a block that only reads is run with these reads moved to its
beginning, in the order in which the pass comes by.
"""

from nnterp.traced_block._cells import know_cell
from nnterp.traced_block._followed import LastInWith, refuse_followed
from nnterp.traced_block._opening import OpeningTransformer
from nnterp.traced_block._request import RequestTracer
from nnterp.traced_block._tracer import BlockTracer, EditTracer, SessionTracer

__all__ = [
    "BlockTracer",
    "EditTracer",
    "LastInWith",
    "OpeningTransformer",
    "RequestTracer",
    "SessionTracer",
    "know_cell",
    "refuse_followed",
]
