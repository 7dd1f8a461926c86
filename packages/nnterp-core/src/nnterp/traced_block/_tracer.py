"""`BlockTracer`: nnsight's tracer, which looks at the block before it runs it."""

from __future__ import annotations

import ast
import copy
import re
import traceback
from collections.abc import Mapping
from types import CodeType, FrameType, TracebackType
from typing import Any

from nnsight.intervention.editing import EditingTracer
from nnsight.intervention.interleaver import OutOfOrderError
from nnsight.intervention.tracer import InterleavingTracer, Invoker, ScanningTracer
from nnsight.schema.config import CONFIG
from nnsight.tracing.tracer import Tracer
from nnsight.tracing.util import filter_traceback

from nnterp.traced import StepTracer
from nnterp.traced_block._advice import lines_in_order
from nnterp.traced_block._followed import LastInWith, refuse_followed
from nnterp.traced_block._lost_edits import refuse_lost_edits
from nnterp.traced_block._order import in_table_order, sorted_reads
from nnterp.traced_block._reads import FIRST, Read, names_of_model, read_at, reads_of

GRADIENT = re.compile(r"'\d+\.grad\.")  # how nnsight's error begins if a gradient is asked for that does not come
NO_GRADIENT = (
    "The backward pass is already past this gradient, or the number does not depend on the tensor. Read .grad from the "
    "last value to the first. What nnterp computes from the model's own tensors (heads, contributions, what experts "
    "return) is a new tensor, which the model does not go on with: model.gradients(prompts, metric, value) has its "
    "gradient; or, if it can be written, assign it before you go on: x = model.VALUE[i]; model.VALUE[i] = x."
)
KEPT = "_nnterp_read_first"  # the name, in the block, of what is read at its beginning


class BlockTracer(LastInWith, StepTracer):
    """Runs a block that only reads with its reads in forward order, any other as it is; one thread at a time."""

    def execute(self, code: CodeType) -> None:
        """Run the block; see `InterleavingTracer.execute`.

        Raises:
            OutOfOrderError: A value was read that the forward pass had left behind, in a block that does more than
                read at constant indices. Shows the block's lines in the order that works.
        """
        frame, node = self.info.frame, self.node  # cleared when the block has run
        try:
            with self.envoy._turn:  # type: ignore[union-attr]
                InterleavingTracer.execute(self, in_forward_order(self, self.envoy, node, code, frame))
        except Exception as error:
            if isinstance(error, OutOfOrderError):
                explain_order(error, self.envoy, node, frame)
            error.__traceback__ = shortened(error.__traceback__, frame, node)
            raise

    def invoke(self, *args: Any, **kwargs: Any) -> BlockInvoker:
        """See `InterleavingTracer.invoke`."""
        return BlockInvoker(self, *args, **kwargs)


class BlockInvoker(LastInWith, Invoker):
    """The block of one `tracer.invoke(...)`, as `BlockTracer` treats its own."""

    def execute(self, code: CodeType) -> None:
        """Register the block to be run; see `Invoker.execute`."""
        Invoker.execute(self, in_forward_order(self, self.tracer.envoy, self.node, code, self.info.frame))


class SessionTracer(LastInWith):
    """nnsight's tracer of a session; a remote one sends nnsight's own, and looks at the traces in its block first."""

    def __reduce_ex__(self, protocol: Any) -> tuple:
        refuse_followed(self.node)
        return object.__new__, (Tracer,), self.__getstate__()


class ScanTracer(LastInWith, ScanningTracer):
    """nnsight's tracer of a scan."""


class EditTracer(LastInWith, EditingTracer):
    """nnsight's tracer of an edit."""


def in_forward_order(tracer: Any, model: Any, node: Any, code: CodeType, frame: FrameType) -> CodeType:
    """The code to run for a block: its own, or, if it only reads, and in another order, with its reads sorted.

    Args:
        tracer: The tracer, which compiles.
        model: The model that is traced.
        node: The `with` statement.
        code: Its block.
        frame: Where it stands.

    Raises:
        ValueError: It edits features where it reads them, which changes nothing.
    """
    # Looked at once. nnsight keeps the node for as long as the program runs, so that its id stays its own.
    known: dict[int, CodeType | None] = model.__dict__.setdefault("_sorted_blocks", {})
    if id(node) not in known:
        scope = _scope(frame)
        refuse_lost_edits(model, node, scope)
        known[id(node)] = _sorted(tracer, model, node, frame)
    return known[id(node)] or code


def _sorted(tracer: Any, model: Any, node: Any, frame: FrameType) -> CodeType | None:
    """The block with its reads moved to its beginning; None if it may run as it is."""
    scope = _scope(frame)
    found = reads_of(node.body, scope, model)
    if found is None or in_table_order(model, found):
        return None
    order = sorted_reads(model, found)
    if order is None:
        return None
    place = {(read.name, read.layer): i for i, read in enumerate(order)}
    moved = _Moved(names_of_model(node.body, scope, model), place)
    kept = ast.Assign([ast.Name(KEPT, ast.Store())], ast.Tuple([_kept(read) for read in order], ast.Load()))
    ast.copy_location(kept, node.body[0])
    body = [kept, *(moved.visit(copy.deepcopy(statement)) for statement in node.body)]
    module = ast.fix_missing_locations(ast.Module(body=body, type_ignores=[]))
    return tracer.compile(module, frame)


def _kept(read: Read) -> ast.expr:
    """The expression that reads a value and copies it, so that no later part of the run changes it."""
    node = copy.deepcopy(read.node)
    return node if read.name in FIRST else ast.Call(ast.Attribute(node, "clone", ast.Load()), [], [])


class _Moved(ast.NodeTransformer):
    """Puts, for each read of a block, the entry of what was read at its beginning."""

    def __init__(self, names: set[str], place: Mapping[Any, int]) -> None:
        self.names, self.place = names, place

    def visit(self, node: ast.AST) -> Any:
        """The node, or what stands for it."""
        read: Read | None = read_at(node, self.names)
        if read is None:
            return self.generic_visit(node)
        entry = ast.Constant(self.place[read.name, read.layer])
        kept = ast.Subscript(ast.Name(KEPT, ast.Load()), entry, ast.Load())
        return ast.fix_missing_locations(ast.copy_location(kept, node))


def shortened(trace: TracebackType | None, frame: FrameType | None, node: ast.AST | None) -> TracebackType | None:
    """A traceback without what stands between the `with` and its block: the model's forward pass, 20 to 50 frames.

    Below a block of the user's, frames of nnterp are left out as well, except the one that raised. An error that does
    not come out of the block keeps all its frames, and so does every error while nnsight's `CONFIG.APP.DEBUG` is set.
    """
    if frame is None or not isinstance(node, ast.With) or CONFIG.APP.DEBUG:
        return trace
    walked = list(traceback.walk_tb(trace))
    block, last = frame.f_code.co_filename, node.end_lineno or node.lineno
    starts = (i for i, (f, line) in enumerate(walked) if f.f_code.co_filename == block and node.lineno <= line <= last)
    start = next(starts, None)
    if start is None:
        return trace
    below = [entry for entry, _ in walked[start:]]
    kept = {id(entry) for entry in below if _is_nnterps(below[0]) or not _is_nnterps(entry)} | {id(below[-1])}
    return filter_traceback(trace, lambda entry: id(entry) in kept)


def _is_nnterps(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0] == "nnterp"


def _scope(frame: FrameType) -> dict[str, Any]:
    """The variables that a block sees."""
    return {**frame.f_globals, **frame.f_locals}


def explain_order(error: OutOfOrderError, model: Any, node: Any, frame: FrameType | None) -> None:
    """Add the block's lines in the order that works to an error, or say why there is no gradient; it stays the same
    object.
    """
    if GRADIENT.match(str(error.args[0])):
        error.args = (f"{NO_GRADIENT} [{error.args[0]}]", *error.args[1:])
        return
    if frame is None or node is None:
        return
    lines = lines_in_order(model, node.body, names_of_model(node.body, _scope(frame), model))
    if lines:
        error.args = (f"{error.args[0]}\nIn this order the lines of the block work:\n{lines}", *error.args[1:])
