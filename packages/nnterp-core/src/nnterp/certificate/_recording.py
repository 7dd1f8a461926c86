"""One forward pass of the plain HuggingFace module, watched by plain torch hooks: the certificate's independent eye."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


@dataclass
class Call:
    """One call of a module: what went in, what came out, and when it began and ended."""

    args: tuple
    kwargs: dict[str, Any]
    output: Any = None
    began: int = 0
    ended: int = 0

    @property
    def stream_in(self) -> torch.Tensor | None:
        """The stream among what went in."""
        return stream_in(self.args, self.kwargs)

    @property
    def stream_out(self) -> torch.Tensor | None:
        """The stream among what came out."""
        return stream_out(self.output)


@dataclass
class Recording:
    """The calls of every watched module in one forward pass, and what the model returned."""

    calls: dict[str, list[Call]] = field(default_factory=dict)
    result: Any = None

    def call(self, path: str) -> Call | None:
        """The first call of a module, or None if it never ran."""
        return self.calls[path][0] if self.calls.get(path) else None

    def last_call(self, path: str) -> Call | None:
        """The last call of a module, or None if it never ran."""
        return self.calls[path][-1] if self.calls.get(path) else None

    def within(self, path: str, outer: Call) -> Call | None:
        """The first call of a module during another call, or None."""
        return next((c for c in self.calls.get(path, ()) if outer.began < c.began < outer.ended), None)


def stream_in(args: tuple, kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    """The first floating tensor among a module's arguments, by position and then by keyword."""
    named = [kwargs[name] for name in ("hidden_states", *kwargs) if name in kwargs]
    return next((x for x in (*args, *named) if isinstance(x, torch.Tensor) and x.is_floating_point()), None)


def stream_out(output: Any) -> torch.Tensor | None:
    """The tensor a module returned, or the first of several."""
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    return output if isinstance(output, torch.Tensor) else None


def record(model: nn.Module, inputs: Mapping[str, Any], paths: set[str]) -> Recording:
    """Run the model once and keep the calls of the modules at `paths`.

    Args:
        model: The HuggingFace module.
        inputs: Keyword arguments of its forward.
        paths: Modules to watch.
    """
    recording = Recording()
    clock = 0
    handles = []

    def watch(path: str, module: nn.Module) -> None:
        open_calls: list[Call] = []

        def before(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            nonlocal clock
            clock += 1
            call = Call(_copied(args), {k: _copied(v) for k, v in kwargs.items()}, began=clock)
            recording.calls.setdefault(path, []).append(call)
            open_calls.append(call)

        def after(_: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            nonlocal clock
            clock += 1
            call = open_calls.pop()
            call.ended = clock
            call.output = _copied(output)

        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after, with_kwargs=True))

    try:
        for path in sorted(paths):
            watch(path, model.get_submodule(path))
        recording.result = model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return recording


def _copied(value: Any) -> Any:
    """A copy of a tensor, because models edit in place; containers of a call are copied one level down."""
    if isinstance(value, torch.Tensor):
        return value.detach() if value.device.type == "meta" else value.detach().clone()
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return tuple(_copied(item) for item in value)
    if isinstance(value, list):
        return [_copied(item) for item in value]
    return value


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without gradients and dropout; every module's training flag is given back as it was."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def static_experts(model: nn.Module) -> Iterator[None]:
    """Run mixtures of experts in the one implementation whose shapes do not depend on which experts are chosen."""
    before = getattr(getattr(model, "config", None), "_experts_implementation", None)
    switch = getattr(model, "set_experts_implementation", None)
    if before is None or switch is None:
        yield
        return
    switch("batched_mm")
    try:
        yield
    finally:
        switch(before)
