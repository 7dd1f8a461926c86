"""Record one forward pass of the plain module: modules by torch hooks, operations in a forward by nnsight.

nnsight labels the calls and assignments in a forward after its source text (`envoy.source.{name}_{n}`). Labels change
with the versions of transformers and nnsight, so no label is written in nnterp's code. A forward pass is recorded
instead, with the arguments and results of every operation, and an operation is recognised by its tensors.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from nnsight.intervention.source import STATE, SourceNotAvailable, bind, instrument
from torch import nn
from torch._subclasses.fake_tensor import is_fake

from nnterp.anatomy import Layer
from nnterp.discovery import _decorators  # noqa: F401 (it makes nnsight parse each decorator once)
from nnterp.huggingface import with_logits
from nnterp.table import Side
from nnterp.tensors import copied, stream_in, stream_out

Labels = tuple[str, ...]  # an operation in a module's forward: the functions that call it, outermost first, then itself


@dataclass
class Call:
    """One call of a module.

    Attributes:
        args, kwargs: Copies of what it was called with.
        output: A copy of what it returned.
        began, ended: When, on the recording's clock.
    """

    args: tuple
    kwargs: dict[str, Any]
    output: Any = None
    began: int = 0
    ended: int = 0

    @property
    def stream_in(self) -> torch.Tensor | None:
        """The stream among the arguments, see `nnterp.tensors.stream_in`; None if there is none."""
        return stream_in(self.args, self.kwargs)

    @property
    def stream_out(self) -> torch.Tensor | None:
        """The output, or its first entry, if that is a tensor; else None."""
        return stream_out(self.output)

    @property
    def floats_in(self) -> list[torch.Tensor]:
        """All floating tensors among the arguments."""
        given = (*self.args, *self.kwargs.values())
        return [x for x in given if isinstance(x, torch.Tensor) and x.is_floating_point()]


@dataclass
class Operation:
    """One call or assignment in a module's forward.

    Attributes:
        path: The module whose forward it belongs to.
        labels: nnsight's labels from that forward down to the operation.
        function: What was called; None for an assignment.
        args, kwargs: Copies of what it was called with.
        output: A copy of what it returned.
        began, ended: When, on the recording's clock.
        times: How often it ran; in a layer that runs several times, in one run of the layer. The rest describes the
            first.
    """

    path: str
    labels: Labels
    function: Any
    args: tuple
    kwargs: dict[str, Any]
    output: Any = None
    began: int = 0
    ended: int = 0
    times: int = 1

    @property
    def called(self) -> str:
        """Name of the function that was called; "" for an assignment."""
        return getattr(self.function, "__name__", type(self.function).__name__) if self.function is not None else ""

    def tensors_in(self) -> Iterator[tuple[str | int, torch.Tensor]]:
        """(position or keyword, tensor) of each tensor it was called with."""
        given: list[tuple[str | int, Any]] = [*enumerate(self.args), *self.kwargs.items()]
        for key, value in given:
            if isinstance(value, torch.Tensor):
                yield key, value

    def tensors_out(self) -> Iterator[tuple[int | None, torch.Tensor]]:
        """(index, tensor) of each tensor it returned; the index is None where it returned one tensor."""
        if isinstance(self.output, torch.Tensor):
            yield None, self.output
        elif isinstance(self.output, (tuple, list)):
            for i, item in enumerate(self.output):
                if isinstance(item, torch.Tensor):
                    yield i, item

    def __str__(self) -> str:
        return f"{self.path}.source.{'.source.'.join(self.labels)}"


@dataclass(frozen=True)
class SourceText:
    """Source of an instrumented function.

    Attributes:
        file: The file it stands in.
        text: Its source.
        lines: Label → its line in the text.
        start: The function's first line in the file.
    """

    file: str
    text: str
    lines: dict[str, int]
    start: int


@dataclass
class Recording:
    """What was recorded of one forward pass.

    Attributes:
        calls: Module path → its calls, in order.
        operations: The operations of the instrumented forwards, in the order in which they ended.
        texts: (module path, labels of a function; `()` for the forward itself) → its source.
        result: What the model returned.
        edited: (module path, "input" or "output") of the streams that were edited in place after they passed there.
    """

    calls: dict[str, list[Call]] = field(default_factory=dict)
    operations: list[Operation] = field(default_factory=list)
    texts: dict[tuple[str, Labels], SourceText] = field(default_factory=dict)
    result: Any = None
    edited: set[tuple[str, Side]] = field(default_factory=set)

    def call(self, path: str) -> Call | None:
        """The first call of a module, or None if it never ran."""
        return self.calls[path][0] if self.calls.get(path) else None

    def last_call(self, path: str) -> Call | None:
        """The last call of a module, or None if it never ran."""
        return self.calls[path][-1] if self.calls.get(path) else None

    def within(self, path: str, outer: Call) -> Call | None:
        """The first call of a module during another call, or None."""
        return next((c for c in self.calls.get(path, ()) if outer.began < c.began < outer.ended), None)

    def given(self, path: str) -> torch.Tensor | None:
        """The stream that a module was given in its first call; None if there is none or it never ran."""
        call = self.call(path)
        return None if call is None else call.stream_in

    def made(self, path: str) -> torch.Tensor | None:
        """The stream that a module returned from its first call; None if there is none or it never ran."""
        call = self.call(path)
        return None if call is None else call.stream_out

    def during(self, outer: Call) -> Recording:
        """What was recorded during one call, that call included."""
        calls = {path: [c for c in own if outer.began <= c.began <= outer.ended] for path, own in self.calls.items()}
        operations = [o for o in self.operations if outer.began <= o.began <= outer.ended]
        return Recording({path: own for path, own in calls.items() if own}, operations, self.texts, self.result)

    def of(self, layer: Layer) -> Recording:
        """What was recorded while one run of a layer lasted; all, for a layer that runs once."""
        if layer.turns == 1:
            return self
        calls = self.calls.get(layer.path, ())
        return self.during(calls[layer.turn]) if layer.turn < len(calls) else Recording(texts=self.texts)

    def operations_of(self, path: str) -> list[Operation]:
        """The operations of one module's forward and of the instrumented functions that it calls."""
        return [operation for operation in self.operations if operation.path == path]

    def ticks(self) -> dict[tuple[str, Labels, str], int]:
        """(path, labels, "input" or "output") → when the forward pass first reached it; a module's labels are `()`."""
        found: dict[tuple[str, Labels, str], int] = {}
        for path, calls in self.calls.items():
            found[path, (), "input"], found[path, (), "output"] = calls[0].began, calls[0].ended
        for operation in self.operations:
            found.setdefault((operation.path, operation.labels, "input"), operation.began)
            found.setdefault((operation.path, operation.labels, "output"), operation.ended)
        return found

    def turns(self) -> dict[tuple[str, Labels], tuple[tuple[int, int], ...]]:
        """(path, labels) → when it began and ended, each time; of what was reached more than once, each time alone."""
        found: dict[tuple[str, Labels], list[tuple[int, int]]] = {}
        for path, calls in self.calls.items():
            found[path, ()] = [(call.began, call.ended) for call in calls]
        for operation in self.operations:
            at = (operation.began, operation.ended)
            found.setdefault((operation.path, operation.labels), []).extend([at] * operation.times)
        return {key: tuple(times) for key, times in found.items() if len(times) > 1}


Edits = Mapping[tuple[str, Labels], Callable[[Any], Any]]


def record(
    root: nn.Module,
    run: Callable[[], Any],
    *,
    modules: Iterable[str] = (),
    operations: Iterable[str] = (),
    look_into: Callable[[Any], bool] | None = None,
    arguments: bool = True,
    edits: Edits | None = None,
    edited_alone: bool = False,
    looped: Iterable[str] = (),
) -> Recording:
    """Run a forward pass and record the calls of some modules and the operations in the forwards of some.

    Args:
        root: The HuggingFace module; to record operations, nnsight must have wrapped it.
        run: Runs the forward pass.
        modules: Paths of the modules whose calls are recorded.
        operations: Paths of the modules in whose forwards operations are recorded. Those whose forward has no Python
            source are left out.
        look_into: True for a function whose operations are recorded too, when such a forward calls it; by default for
            the functions of modelling files.
        arguments: Whether to record the arguments of operations.
        edits: (path, labels) of an operation → a function of its output; what it returns replaces the output.
        edited_alone: Whether to record no operations but those in `edits`.
        looped: Paths of layers that run several times: operations are recorded in each of their runs.
    """
    recorder = _Recorder(look_into or in_modelling_code, arguments, edits or {}, edited_alone)
    modules = dict.fromkeys((*modules, *looped))
    with contextlib.ExitStack() as stack:
        for path in looped:
            stack.callback(root.get_submodule(path).register_forward_pre_hook(recorder.next_run).remove)
        for path in operations:
            recorder.instrument(root.get_submodule(path), path, stack)
        for path in modules:
            recorder.watch(root.get_submodule(path), path, stack)
        recorder.recording.result = with_logits(run())
    recorder.recording.edited = recorder.edited()
    return recorder.recording


def _changed(stream: torch.Tensor, then: int | torch.Tensor) -> bool:
    """Whether a stream was edited since it had this version, or was this."""
    if isinstance(then, torch.Tensor):
        return not torch.allclose(stream, then, rtol=0, atol=0, equal_nan=True)
    return stream._version != then


class _Recorder:
    def __init__(self, look_into: Callable[[Any], bool], arguments: bool, edits: Edits, edited_alone: bool) -> None:
        self.look_into, self.arguments, self.edits, self.edited_alone = look_into, arguments, edits, edited_alone
        self.recording = Recording()
        self.seen: dict[tuple[str, Labels, int], Operation] = {}
        self.clock, self.run_of_layer = 0, 0
        # Streams, and how often each was edited by then; in inference mode torch does not count, and it is a copy.
        self.passed: list[tuple[str, Side, torch.Tensor, int | torch.Tensor]] = []

    def passes(self, path: str, side: Side, stream: torch.Tensor | None) -> None:
        """Remember the stream that passes an edge of a module."""
        if stream is not None and not (stream.is_inference() and is_fake(stream)):
            self.passed.append((path, side, stream, stream.clone() if stream.is_inference() else stream._version))

    def edited(self) -> set[tuple[str, Side]]:
        """The edges whose stream was edited in place since it passed."""
        return {(path, side) for path, side, stream, then in self.passed if _changed(stream, then)}

    def tick(self) -> int:
        self.clock += 1
        return self.clock

    def next_run(self, *_: Any) -> None:
        """Record operations anew, though they may have run before: a looped layer begins."""
        self.run_of_layer += 1

    def watch(self, module: nn.Module, path: str, stack: contextlib.ExitStack) -> None:
        """Record the calls of a module."""
        running: list[Call] = []

        def before(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            call = Call(copied(args), {k: copied(v) for k, v in kwargs.items()}, began=self.tick())
            self.recording.calls.setdefault(path, []).append(call)
            running.append(call)
            self.passes(path, "input", stream_in(args, kwargs))

        def after(_: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            call = running.pop()
            call.ended, call.output = self.tick(), copied(output)
            self.passes(path, "output", stream_out(output))

        stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
        stack.callback(module.register_forward_hook(after, with_kwargs=True).remove)

    def instrument(self, module: nn.Module, path: str, stack: contextlib.ExitStack) -> None:
        """Record the operations of a module's forward."""
        state = module.__dict__[STATE]
        try:
            body, compiled = instrument(state.original, self.bracket(path, ()))
        except SourceNotAvailable:
            return
        self.keep_text(path, (), compiled)
        stack.enter_context(_with_body(state, body))

    def keep_text(self, path: str, labels: Labels, compiled: Any) -> None:
        code = compiled.code
        self.recording.texts[path, labels] = SourceText(
            code.co_filename, compiled.source, compiled.lines, code.co_firstlineno
        )

    def bracket(self, path: str, prefix: Labels) -> Callable:
        """The function that nnsight calls in place of every operation: it runs the operation and records it."""

        def operation(location: str, function: Any, *args: Any, **kwargs: Any) -> Any:
            labels = (*prefix, location.removeprefix("source."))
            if self.edited_alone and (path, labels) not in self.edits:
                return self.run(function, path, labels)(*args, **kwargs)
            began = self.tick()
            given = copied(args) if self.arguments else ()
            named = {k: copied(v) for k, v in kwargs.items()} if self.arguments else {}
            output = self.run(function, path, labels)(*args, **kwargs)
            if (path, labels) in self.edits:
                output = self.edits[path, labels](output)
            called = None if function is bind else function
            self.keep(Operation(path, labels, called, given, named, began=began), output)
            return output

        return operation

    def run(self, function: Any, path: str, labels: Labels) -> Callable:
        """The function to run: instrumented, if `look_into` says so and it has source."""
        if function is not bind and self.look_into(function):
            with contextlib.suppress(SourceNotAvailable):
                instrumented, compiled = instrument(function, self.bracket(path, labels))
                self.keep_text(path, labels, compiled)
                return instrumented
        return function

    def keep(self, operation: Operation, output: Any) -> None:
        operation.ended = self.tick()
        key = operation.path, operation.labels, self.run_of_layer
        earlier = self.seen.get(key)
        if earlier is not None:
            earlier.times += 1
            return
        operation.output = copied(output)
        self.seen[key] = operation
        self.recording.operations.append(operation)


@contextlib.contextmanager
def _with_body(state: Any, body: Callable) -> Iterator[None]:
    """Run another forward in place of the module's own inside the block."""
    before = state.body
    state.body = body
    try:
        yield
    finally:
        state.body = before


def in_modelling_code(function: Any) -> bool:
    """Whether a function belongs to a model's own code, transformers' or remote."""
    if isinstance(function, (nn.Module, type)) or not (inspect.isfunction(function) or inspect.ismethod(function)):
        return False
    home = getattr(function, "__module__", "") or ""
    return home.startswith(("transformers.models.", "transformers_modules.")) or not home.startswith(
        ("torch", "transformers", "nnsight", "nnterp", "builtins", "accelerate", "functools", "einops")
    )
