"""Questions about torch modules: what they hold, where they are in the model, whether they are norms or experts."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn


def get_child(module: nn.Module, path: str) -> nn.Module | None:
    """The submodule at a dotted path; None if there is none."""
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None


def children(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Name and module of each direct child. A module that is held under two names is listed twice."""
    # `named_children` would list it once.
    return [(name, child) for name, child in module._modules.items() if child is not None]


def sublayers(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Find the children that may hold a part (Zamba), entries of a list of different sublayers too (T5).

    Returns:
        Path (relative to the layer) and module of each.
    """
    for name, child in layer.named_children():
        if not isinstance(child, nn.ModuleList):
            if not is_norm(child):
                yield name, child
        elif len({type(entry) for entry in child}) > 1:
            yield from ((f"{name}.{i}", entry) for i, entry in enumerate(child))


def path_of(model: nn.Module, module: nn.Module | None) -> str | None:
    """The path of a module in the model, its first one if it has several; None if it is not in the model."""
    return next((path for path, other in model.named_modules() if other is module), None)


def ancestors(path: str) -> Iterator[str]:
    """The paths of the modules around a module, innermost first; the last is "", the model itself."""
    while path:
        path = path.rpartition(".")[0]
        yield path


def is_norm(module: nn.Module) -> bool:
    """Whether the module is a norm and nothing more."""
    return "norm" in type(module).__name__.lower() and not children(module)


def is_moe(module: nn.Module) -> bool:
    """Whether a feed-forward routes tokens to experts."""
    return any(module._modules.get(name) is not None for name in ("experts", "router", "gate_router"))


def family_name(model: nn.Module) -> str:
    """The name of the architecture, with which its module classes begin: "Llama" for `LlamaForCausalLM`."""
    return re.sub(r"(For[A-Z].*|LMHead.*|WithLMHead.*|Decoder)$", "", type(model).__name__)


def class_name(module: nn.Module, family: str) -> str:
    """The name of a module's class without `family`, which may itself say "Linear" or "Mamba"."""
    return type(module).__name__.removeprefix(family)


def recorded_classes(model: nn.Module, key: str) -> tuple[type, ...]:
    """The module classes that transformers records as `key` ("hidden_states", "attentions") in this model."""
    classes: list[type] = []
    for module in model.modules():
        records = getattr(module, "_can_record_outputs", None) if hasattr(module, "config") else None
        if isinstance(records, dict) and key in records:
            entries = records[key]
            targets = [getattr(e, "target_class", e) for e in (entries if isinstance(entries, list) else [entries])]
            each = [one for target in targets for one in (target if isinstance(target, tuple) else (target,))]
            classes += [target for target in each if isinstance(target, type)]
    return tuple(classes)
