"""Steerings that stand for a while: every run of the model is steered, also one of the HuggingFace module itself.

In nnsight's runs the traced half starts a worker for each of them (`nnterp.traced`). A direct call of the module, as an
evaluation harness makes it, runs no workers: there, torch hooks on the layers do the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from nnterp.errors import Unavailable
from nnterp.record import replace
from nnterp.tensors import stream_out
from nnterp.traced import Chosen, Condition, InRun, Place, Site, Steering, change, is_apart


class Steerable(Protocol):
    """What a standing steering needs of a model."""

    standing: tuple
    interleaver: Any
    layer_paths: tuple[str, ...]
    model_class: str
    _module: nn.Module

    @property
    def dispatched(self) -> bool:
        """Whether the weights are loaded."""
        ...

    def place(self, name: str, layer: int | tuple[int, int] | str | None = None) -> Place:
        """Where a value is served."""
        ...


@contextlib.contextmanager
def standing(model: Steerable, steering: Steering) -> Iterator[None]:
    """Steer every run of the model in the block; nested ones act in the order in which they were entered."""
    model.standing = (*model.standing, steering)
    handles = hooks(model, steering)
    try:
        yield
    finally:
        model.standing = tuple(other for other in model.standing if other is not steering)
        for handle in handles:
            handle.remove()


def conditional(steering: Steering, when: Condition | Callable[[tuple[int, ...]], bool]) -> Steering:
    """A steering of the rows whose prompt fulfils a condition, which is read no later than what is steered.

    Raises:
        TypeError: `when` is no condition and no function.
        ValueError: The condition is read at a later layer.
    """
    if not isinstance(when, Condition) and not callable(when):
        raise TypeError(f"steering: when={when!r}; give a nnterp.Condition or a function of the prompt's token ids.")
    condition = when if isinstance(when, Condition) else Chosen(when)
    first = min(steering.vectors)
    if condition.layer > first:
        raise ValueError(
            f"steering: the condition is read at layer {condition.layer}, after layer {first}, which is steered."
        )
    return replace(steering, condition=condition)


@contextlib.contextmanager
def unsteered(model: Steerable) -> Iterator[None]:
    """No steering in the block: what is proven of a model is proven of the model as it is."""
    kept, model.standing = model.standing, ()
    try:
        yield
    finally:
        model.standing = kept


def hooks(model: Steerable, steering: Steering) -> list[RemovableHandle]:
    """Hooks that steer direct calls of the module; none while the weights are absent, because it cannot be called."""
    if not model.dispatched:
        return []
    return [
        model._module.get_submodule(model.layer_paths[layer]).register_forward_hook(
            _hook(model, steering, layer), prepend=True
        )
        for layer in steering.vectors
    ]


def _hook(model: Steerable, steering: Steering, layer: int) -> Callable[[nn.Module, tuple, Any], Any]:
    def steer(module: nn.Module, args: tuple, output: Any) -> Any:
        mine = model.interleaver.interleaving or is_apart(model.interleaver)  # a run of nnterp itself
        if mine or all(other is not steering for other in model.standing):
            return None
        own = steering.others
        limited = [name for name in ("token_positions", "batch_index") if own[name] is not None]
        limited += [name for name in ("steps", "condition") if getattr(steering, name) not in (None, "all")]
        if limited:
            raise Unavailable(
                f"The HuggingFace module was called directly under a steering with {', '.join(limited)}=, which needs "
                "to know which tokens run. Run it through model.trace or model.generate, or steer without."
            )
        place = model.place("layers_output", layer)
        if isinstance(place, InRun):
            raise Unavailable(
                f"The HuggingFace module was called directly under a steering, and {model.model_class} runs its layers "
                "several times. Run it through model.trace or model.generate."
            )
        if not isinstance(place, Site):
            raise Unavailable(
                f"The HuggingFace module was called directly under a steering, and {model.model_class} keeps the "
                f"stream leaving layer {layer} in a layout of its own. Run it through model.trace or model.generate."
            )
        stream = stream_out(output)
        assert isinstance(stream, torch.Tensor)
        new = change(stream, steering.vectors[layer].to(stream.device), own)
        return new if isinstance(output, torch.Tensor) else type(output)((new, *output[1:]))

    return steer
