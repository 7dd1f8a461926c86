"""What a proof rests on beside the weights' values: modules, their forwards and numbers, and the config.

A fingerprint is taken when a model is proven and compared whenever it is used, so that a change in between is noticed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from nnsight.intervention.source import Controller
from torch import nn

# Fields of a config that say nothing of what a forward pass computes.
_IDLE = frozenset(
    "use_cache _name_or_path _commit_hash transformers_version architectures output_attentions _output_attentions "
    "output_hidden_states _output_hidden_states id2label label2id problem_type task_specific_params name_or_path "
    "bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id".split()
)

_FACTOR = re.compile(r"scal(e|ing)|multiplier|softcap|logit_cap|_cap$|temperature|_alpha$|_factor$")


@dataclass(frozen=True)
class Fingerprint:
    """Compared by `difference`.

    Attributes:
        modules: Every module, in the order of `walk`.
        forwards: For each, the forward that was put on the instance; nnsight's own counts as one and the same.
        numbers: For each, its scales, caps and other factors that are plain numbers, by name.
        configs: Every config of the model, and its fields.
        factors: Learned factors whose values the proof has read, and their version counters.
    """

    modules: list[nn.Module]
    forwards: list[Any]
    numbers: list[dict[str, float | None]]
    configs: list[tuple[Any, dict[str, Any]]]
    factors: list[tuple[str, torch.Tensor, int]]

    @classmethod
    def of(cls, root: nn.Module, factors: bool = False) -> Fingerprint:
        """Take the fingerprint of a model.

        Args:
            root: The HuggingFace module.
            factors: Whether values of learned factors were read, so that editing them is a change.
        """
        modules = walk(root)
        configs = list(_configs(modules))
        return cls(
            modules,
            [_forward(module) for module in modules],
            [_numbers(module) for module in modules],
            [(config, _fields(config)) for config in configs],
            list(_factors(root)) if factors else [],
        )

    def difference(self, root: nn.Module) -> str:
        """What is different now, in words; "" if nothing is."""
        modules = walk(root)
        if modules != self.modules:
            return self._modules_in_words(root, modules)
        for module, forward, numbers in zip(modules, self.forwards, self.numbers, strict=True):
            if _forward(module) is not forward:
                return f"the forward of {_path(root, module)} was replaced"
            held = module.__dict__
            for name, number in numbers.items():
                if (now := held.get(name)) != number and "rotary" not in type(module).__name__.lower():
                    return f"{_path(root, module)}.{name} was {number} and is {now}"
        for config, fields in self.configs:
            if (now := _fields(config)) != fields:
                return ", ".join(
                    f"config.{name} was {fields.get(name)!r} and is {now.get(name)!r}"
                    for name in (*fields, *(name for name in now if name not in fields))
                    if fields.get(name) != now.get(name)
                )[:300]
        compiled = [module for module in modules if module.__dict__.get("_compiled_call_impl") is not None]
        if compiled:
            return f"{_path(root, compiled[0])} was compiled"
        if [id(config) for config in _configs(modules)] != [id(config) for config, _ in self.configs]:
            return "a config was replaced"
        edited = [name for name, tensor, version in self.factors if tensor._version != version]
        return f"{edited[0]}, a learned factor, was edited" if edited else ""

    def _modules_in_words(self, root: nn.Module, now: list[nn.Module]) -> str:
        before = {id(module) for module in self.modules}
        added = [module for module in now if id(module) not in before]
        gone = before - {id(module) for module in now}
        if added:
            first = added[0]
            rest = f" and {len(added) - 1} more" if len(added) > 1 else ""
            return f"{_path(root, first)} is another module, a {type(first).__name__}{rest}"
        return f"{len(gone)} modules were taken out" if gone else "modules stand in other places"


def walk(root: nn.Module) -> list[nn.Module]:
    """Every module, in forward order of the tree; one that stands in several places, at each of them."""
    found, waiting = [], [root]
    while waiting:
        module = waiting.pop()
        found.append(module)
        children = module._modules
        if children:
            waiting.extend([child for child in children.values() if child is not None])
    return found


def _forward(module: nn.Module) -> Any:
    """The forward that was put on a module's instance; nnsight's controllers stand for one and the same."""
    forward = module.__dict__.get("forward")
    return Controller if isinstance(forward, Controller) else forward


def _numbers(module: nn.Module) -> dict[str, float | None]:
    """Attributes of a module that are floats, or that are named as a factor and hold an integer or None."""
    return {
        name: value
        for name, value in vars(module).items()
        if (type(value) is float and value == value)
        or ((value is None or type(value) is int) and name[0] != "_" and _FACTOR.search(name))
    }


def _configs(modules: list[nn.Module]) -> Iterator[Any]:
    """The configs that modules hold, and those inside them, each once."""
    seen: set[int] = set()
    waiting = [modules[0].__dict__.get("config")]
    waiting += [config for module in modules if (config := module.__dict__.get("config")) is not None]
    for config in waiting:
        if config is None or id(config) in seen or not hasattr(config, "__dict__"):
            continue
        seen.add(id(config))
        yield config
        for inner in vars(config).values():
            if hasattr(inner, "to_diff_dict") and id(inner) not in seen:
                seen.add(id(inner))
                yield inner


def _fields(config: Any) -> dict[str, Any]:
    """A config's fields that a forward pass may read; containers as text, because they are edited in place."""
    return {
        name: repr(value) if isinstance(value, (dict, list, tuple, set)) else value
        for name, value in vars(config).items()
        if name not in _IDLE and not hasattr(value, "to_diff_dict")
    }


def _factors(root: nn.Module) -> Iterator[tuple[str, torch.Tensor, int]]:
    """Parameters and buffers that are no matrices, no norms' weights and no biases."""
    for path, module in root.named_modules():
        if "norm" not in type(module).__name__.lower():
            for held in (module._parameters, module._buffers):
                for name, tensor in held.items():
                    if tensor is not None and tensor.dim() < 2 and not name.endswith("bias"):
                        yield f"{path}.{name}", tensor, tensor._version


def _path(root: nn.Module, wanted: nn.Module) -> str:
    return next((path for path, module in root.named_modules() if module is wanted), "") or type(wanted).__name__


# -- edits before the weights are there --------------------------------------------------------------------------------


class AbsentParameter(nn.Parameter):
    """A parameter without weights that remembers what was handed out as its `.data`, through which it may be edited."""

    @property
    def data(self) -> torch.Tensor:  # type: ignore[override]
        """What `Tensor.data` gives."""
        handed = torch.Tensor.data.__get__(self)  # type: ignore[attr-defined]
        self.__dict__.setdefault("handed_out", []).append(handed)
        return handed

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        self.__dict__["replaced"] = True
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]


class Weightless:
    """The parameters of a model without weights, to notice that they were edited: the edit would be lost.

    Attributes:
        fingerprint: Of the modules, and of the config.
        held: Name → the parameter, and its version counter.
    """

    def __init__(self, root: nn.Module) -> None:
        self.fingerprint = Fingerprint.of(root)
        self.held: dict[str, tuple[nn.Parameter, int]] = {}
        for name, parameter in root.named_parameters():
            if type(parameter) is nn.Parameter and parameter.device.type == "meta":
                parameter.__class__ = AbsentParameter
            self.held[name] = (parameter, parameter._version)

    def difference(self, root: nn.Module) -> str:
        """What was edited, in words; "" if nothing was."""
        if what := self.fingerprint.difference(root):
            return what
        now = dict(root.named_parameters())
        edited = [name for name, held in self.held.items() if now.get(name) is not held[0] or _edited(*held)]
        return "" if not edited else f"{', '.join(edited[:3])}{', ...' if len(edited) > 3 else ''} was edited"


def _edited(parameter: nn.Parameter, version: int) -> bool:
    handed = parameter.__dict__.get("handed_out", ())
    return parameter._version != version or "replaced" in parameter.__dict__ or any(one._version for one in handed)
