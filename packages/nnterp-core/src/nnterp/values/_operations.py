"""What happens inside a module's forward: every operation nnsight can serve, watched once on a probe.

nnsight names the calls and assignments of a forward after its source text (`envoy.source.{name}_{n}`). Those names
belong to one version of transformers and of nnsight, so they are never written down here: a probe is run with nnsight's
own instrumented copy of the forward, what every operation was given and returned is kept, and the operation wanted is
recognised by its tensors.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from nnsight.intervention.source import STATE, SourceNotAvailable, bind, instrument
from torch import nn


@dataclass
class Operation:
    """One call or assignment in a forward, as it ran on the probe.

    Attributes:
        path: The module whose forward it belongs to.
        labels: nnsight's labels from that forward down to the operation: the function called, an operation in it, ...
        function: What was called; None for an assignment.
        args, kwargs: Copies of what it was called with.
        output: A copy of what it returned.
        began, ended: When, in ticks shared by all operations of the probe.
        times: How often it ran; what runs several times has no one value to serve.
    """

    path: str
    labels: tuple[str, ...]
    function: Any
    args: tuple
    kwargs: dict[str, Any]
    output: Any = None
    began: int = 0
    ended: int = 0
    times: int = 1

    @property
    def called(self) -> str:
        """The name of the function that was called."""
        return getattr(self.function, "__name__", type(self.function).__name__) if self.function is not None else ""

    def __str__(self) -> str:
        return f"{self.path}.source.{'.source.'.join(self.labels)}"


@dataclass
class Operations:
    """All operations of the watched modules, in the order in which they ended, and what the model returned.

    Attributes:
        all: The operations.
        result: What the model returned.
        ticks: When each place was first passed: (path, labels, "input" or "output") → tick, modules with no labels.
        texts: For each function looked into, (path, labels): file, source, label → line in it, and its first line.
    """

    all: list[Operation] = field(default_factory=list)
    result: Any = None
    ticks: dict[tuple[str, tuple[str, ...], str], int] = field(default_factory=dict)
    texts: dict[tuple[str, tuple[str, ...]], tuple[str, str, dict[str, int], int]] = field(default_factory=dict)

    def of(self, path: str) -> list[Operation]:
        """The operations of one module's forward, those of functions it calls included."""
        return [operation for operation in self.all if operation.path == path]


def record_operations(
    root: nn.Module,
    paths: list[str],
    run: Callable[[], Any],
    drill: Callable[[Any], bool] | None = None,
    edits: Mapping[tuple[str, tuple[str, ...]], Callable[[Any], Any]] | None = None,
    arguments: bool = True,
) -> Operations:
    """Run a forward pass with every operation in the forwards of the modules at `paths` watched.

    Args:
        root: The HuggingFace module, wrapped by nnsight.
        paths: The modules. One whose forward has no Python source is passed over.
        run: Runs the forward pass.
        drill: Whether to look into a function that is called; by default into those of modelling files.
        edits: (path, labels) of an operation → what to replace its output by, given its output.
        arguments: Whether to keep what operations are called with.
    """
    found = Operations()
    seen: dict[tuple[str, tuple[str, ...]], Operation] = {}
    clock = 0
    drill = drill or in_modelling_code

    def tick(path: str, labels: tuple[str, ...], side: str) -> int:
        nonlocal clock
        clock += 1
        found.ticks.setdefault((path, labels, side), clock)
        return clock

    def text(path: str, labels: tuple[str, ...], function: Any, compiled: Any) -> None:
        code = compiled.code
        found.texts[path, labels] = (code.co_filename, compiled.source, compiled.lines, code.co_firstlineno)

    def bracket(path: str, prefix: tuple[str, ...]) -> Callable:
        def op(location: str, function: Any, *args: Any, **kwargs: Any) -> Any:
            labels = (*prefix, location.removeprefix("source."))
            began = tick(path, labels, "input")
            assignment = function is bind
            before = (_copied(args), {k: _copied(v) for k, v in kwargs.items()}) if arguments else ((), {})
            run_ = function
            if not assignment and drill(function):
                with contextlib.suppress(SourceNotAvailable):
                    run_, compiled = instrument(function, bracket(path, labels))
                    text(path, labels, function, compiled)
            output = run_(*args, **kwargs)
            if edits and (path, labels) in edits:
                output = edits[path, labels](output)
            ended = tick(path, labels, "output")
            earlier = seen.get((path, labels))
            if earlier is not None:
                earlier.times += 1
                return output
            given, named = before
            operation = Operation(
                path, labels, None if assignment else function, given, named, _copied(output), began, ended
            )
            seen[path, labels] = operation
            found.all.append(operation)
            return output

        return op

    with contextlib.ExitStack() as stack:
        for path in paths:
            module = root.get_submodule(path)
            state = module.__dict__[STATE]
            try:
                body, compiled = instrument(state.original, bracket(path, ()))
            except SourceNotAvailable:
                continue
            text(path, (), state.original, compiled)
            stack.enter_context(_body(state, body))
        for path, module in root.named_modules(remove_duplicate=False):
            stack.callback(
                module.register_forward_pre_hook(lambda *_, path=path: _none(tick(path, (), "input"))).remove
            )
            stack.callback(module.register_forward_hook(lambda *_, path=path: _none(tick(path, (), "output"))).remove)
        found.result = run()
    return found


def _none(_: int) -> None:
    """A hook that returns something would replace what it watches."""


@contextlib.contextmanager
def _body(state: Any, body: Callable) -> Iterator[None]:
    kept = state.body
    state.body = body
    try:
        yield
    finally:
        state.body = kept


def in_modelling_code(function: Any) -> bool:
    """Whether a function belongs to a model's own code, transformers' or remote."""
    if isinstance(function, (nn.Module, type)) or not (inspect.isfunction(function) or inspect.ismethod(function)):
        return False
    home = getattr(function, "__module__", "") or ""
    return home.startswith(("transformers.models.", "transformers_modules.")) or not home.startswith(
        ("torch", "transformers", "nnsight", "nnterp", "builtins", "accelerate", "functools", "einops")
    )


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if type(value) in (tuple, list):
        return type(value)(_copied(item) for item in value)
    return value


def tensors(operation: Operation) -> Iterator[tuple[str | int, torch.Tensor]]:
    """The tensors an operation was called with, by position and by keyword."""
    for i, arg in enumerate(operation.args):
        if isinstance(arg, torch.Tensor):
            yield i, arg
    for key, arg in operation.kwargs.items():
        if isinstance(arg, torch.Tensor):
            yield key, arg


def same(a: Any, b: Any, tolerance: float) -> bool:
    """Whether two tensors of one shape hold the same numbers."""
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor) or a.shape != b.shape:
        return False
    if not a.numel():
        return True
    if not a.is_floating_point() or not b.is_floating_point():
        return torch.equal(a, b)
    largest = b.abs().max()
    if torch.isfinite(largest):  # nearly all that differ differ in a few places as well
        stride = max(1, b.numel() // 64)
        apart = (a.reshape(-1)[::stride] - b.reshape(-1)[::stride]).abs().max()
        if not apart <= 10 * tolerance * largest.clamp(min=1e-30):
            return False
    a, b = a.double(), b.double()
    finite = torch.isfinite(b)
    if not torch.equal(torch.isfinite(a), finite):
        return False
    a, b = a[finite], b[finite]
    return not a.numel() or bool((a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1e-30))
