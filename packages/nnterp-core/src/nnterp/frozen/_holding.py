"""The mode of torch that holds still, in the backward pass, what was asked for; borders are hooks on modules."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from nnterp.frozen._parts import ACTIVATION, ATTENTION, LAYER, MIXER, MLP, MODEL, NORM, FrozenParts
from nnterp.frozen._rules import ACTIVATIONS, PATTERNS, ROOTS, SCALES, WEIGHTS, detached, glu, sloped, with_slope
from nnterp.frozen._tape import TAPE, Tape, still

# The modules that are running, outermost first: (role, whether the activation is a gate, the module that opened it).
# A traced block runs in a greenlet, which has a context of its own: what it computes itself is never held still.
_RUNNING: ContextVar[list[tuple[str, bool, nn.Module]] | None] = ContextVar("running", default=None)


class Holding(TorchFunctionMode):
    """While it is open, the model's own code is run with what was asked for held still.

    Args:
        module: The HuggingFace module.
        parts: Where its attentions, norms and feed-forwards are.
        kinds: Some of `FROZEN`.
        tape: Records what is held still, or is what another pass held still; None for neither.
    """

    def __init__(self, module: nn.Module, parts: FrozenParts, kinds: tuple[str, ...], tape: Tape | None = None) -> None:
        super().__init__()
        self.module, self.parts, self.kinds, self.tape = module, parts, frozenset(kinds), tape
        self.handles: list[RemovableHandle] = []

    def __enter__(self) -> Holding:
        parts, get = self.parts, self.module.get_submodule
        self._border(self.module, self.module, MODEL)
        for path in parts.layers:
            self._border(get(path), get(path), LAYER)
        for entry, exit_ in parts.attentions:
            self._border(get(entry), get(exit_), ATTENTION)
        for entry, exit_, _ in parts.mixers:
            self._border(get(entry), get(exit_), MIXER)
        for ends in parts.mlps:
            self._border(get(ends[0]), get(ends[1]), MLP, ends not in parts.plain)
        for path in parts.routers:
            self._border(get(path), get(path), MLP)
        for path in parts.norms:
            self._border(get(path), get(path), NORM)
        for path in parts.activations:
            if "gates" in self.kinds:
                self.handles.append(get(path).register_forward_hook(_activated))
            self._border(get(path), get(path), ACTIVATION)
        TAPE.set(self.tape)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        _RUNNING.set(None)
        TAPE.set(None)
        if self.tape is not None and not self.tape.full:
            self.tape.close(error[0] is None)

    def _border(self, entry: nn.Module, exit_: nn.Module, role: str, gated: bool = True) -> None:
        """Note that a part is running, from its first module to its last, also where an error ends it."""

        def begin(*_: Any) -> None:
            if role == MODEL and self.tape is not None:
                self.tape.at = 0  # a pass begins
            running = _RUNNING.get()
            if running is None:
                _RUNNING.set(running := [])
            running.append((role, gated, entry))

        def end(*_: Any) -> None:
            running = _RUNNING.get() or []
            for i in reversed(range(len(running))):
                if running[i][0] == role and running[i][2] is entry:
                    del running[i:]  # and what an error left open inside
                    return

        self.handles.append(entry.register_forward_pre_hook(begin))
        self.handles.append(exit_.register_forward_hook(end, always_call=True))

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        running = _RUNNING.get()
        rule = self._rule(getattr(func, "__name__", ""), running) if running else None
        return func(*args, **kwargs) if rule is None else rule(func, args, kwargs)

    def _rule(self, name: str, running: list[tuple[str, bool, nn.Module]]) -> Callable | None:
        inside = [role for role, _, _ in running]
        if ACTIVATION in inside:
            return None
        if "norms" in self.kinds:
            if name in SCALES:
                return SCALES[name]
            if inside[-1] == NORM and name in ROOTS:
                return ROOTS[name]
        part = _part(running)
        if part is None:
            return None
        role, gated = part
        if role == ATTENTION and "patterns" in self.kinds and name in PATTERNS:
            return PATTERNS[name]
        if "gates" not in self.kinds or role == MIXER:
            return None
        if role == ATTENTION:
            return detached if name in ("sigmoid", "silu", "softplus") else None
        if name == "glu":
            return glu
        if name in WEIGHTS and role == MLP:
            return WEIGHTS[name]
        return None if name not in ACTIVATIONS else detached if gated else sloped


def _part(running: list[tuple[str, bool, nn.Module]]) -> tuple[str, bool] | None:
    """The innermost part that is running, or the layer where none is."""
    for role, gated, _ in reversed(running):
        if role in (ATTENTION, MIXER, MLP, LAYER):
            return role, gated
    return None


def _activated(module: nn.Module, args: tuple, output: Any) -> Any:
    """What an activation's module hands on, in a model whose gates are held still."""
    part = _part(_RUNNING.get() or [])
    if part is None or part[0] == MIXER or not isinstance(output, torch.Tensor):
        return None
    if part[1]:
        return still(output)
    given = next((x for x in args if isinstance(x, torch.Tensor)), None)
    return None if given is None or given.shape != output.shape else with_slope(output, given)


def holding(module: nn.Module, parts: FrozenParts, kinds: tuple[str, ...]) -> contextlib.AbstractContextManager[Any]:
    """`Holding`, or nothing if nothing is to be held still."""
    return Holding(module, parts, kinds) if kinds else contextlib.nullcontext()
