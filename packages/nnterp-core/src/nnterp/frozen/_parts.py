"""Which modules of a model make attention patterns, scales of norms and gates."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn

from nnterp.anatomy import Anatomy, Part

NORM, ATTENTION, MIXER, MLP, LAYER, ACTIVATION, MODEL = (
    *("norm", "attention", "mixer", "mlp", "layer", "activation", "model"),
)
_SOFTMAX_ATTENTION = ("attention", "cross_attention")
_ACTIVATION = re.compile(r"gelu|silu|relu|swish|mish|elu|act(?![a-z])|activation", re.IGNORECASE)
_ROUTER = re.compile(r"router|gating", re.IGNORECASE)
_BY_FUNCTION = ("Softmax", "Softmax2d", "LogSoftmax", "Sigmoid")  # modules that one function of torch computes


@dataclass(frozen=True)
class FrozenParts:
    """The modules at whose borders freezing begins and ends.

    Attributes:
        attentions: Native path → (entry, exit) of each softmax attention.
        mixers: The same of mixers that are no softmax attention, with their kind in words.
        mlps: (entry, exit) of each feed-forward.
        norms: Paths of the norms.
        activations: Paths of the modules that apply an activation.
        routers: Paths of the routers inside attentions (JetMoe's experts are heads): their softmax is no pattern.
        layers: Paths of the layers.
        plain: The feed-forwards in `mlps` whose activation is no gate: its slope is held, and not its result.
    """

    attentions: tuple[tuple[str, str], ...]
    mixers: tuple[tuple[str, str, str], ...]
    mlps: tuple[tuple[str, str], ...]
    norms: tuple[str, ...]
    activations: tuple[str, ...]
    routers: tuple[str, ...]
    layers: tuple[str, ...]
    plain: frozenset[tuple[str, str]] = frozenset()


def find_parts(module: nn.Module, anatomy: Anatomy) -> FrozenParts:
    """Find the modules of a HuggingFace module at which freezing begins and ends.

    Returns:
        Their native paths, read off its anatomy.
    """
    attentions: dict[tuple[str, str], None] = {}
    mixers: dict[tuple[str, str, str], None] = {}
    mlps: dict[tuple[str, str], None] = {}
    for layer in anatomy.blocks:
        found = [layer.self_attn, *layer.attentions]
        if layer.mixer is not None and layer.mixer not in found and layer.kind in _SOFTMAX_ATTENTION:
            found.append(layer.mixer)
        elif layer.mixer is not None and layer.mixer not in found:
            mixers[*_ends(layer.mixer), layer.kind.replace("_", " ")] = None
        attentions |= dict.fromkeys(_ends(part) for part in found if part is not None)
        if layer.mlp is not None:
            mlps[_ends(layer.mlp)] = None
    names = dict(module.named_modules())
    return FrozenParts(
        tuple(attentions),
        tuple(mixers),
        tuple(mlps),
        tuple(path for path, inner in names.items() if _is_norm(inner)),
        tuple(path for path, inner in names.items() if _is_activation(inner)),
        tuple(
            path
            for path, inner in names.items()
            if _ROUTER.search(type(inner).__name__) and any(path.startswith(f"{entry}.") for entry, _ in attentions)
        ),
        tuple(dict.fromkeys(layer.path for layer in anatomy.blocks)),
    )


def _ends(part: Part) -> tuple[str, str]:
    return (part.path, part.path) if part.path is not None else (part.entry, part.exit)


def _is_leaf(module: nn.Module) -> bool:
    return all(child is None for child in module._modules.values())


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() and _is_leaf(module)


def _is_activation(module: nn.Module) -> bool:
    """Whether a module applies an activation and nothing more; a softmax is a pattern, or a router's."""
    cls = type(module)
    if (
        not _is_leaf(module)
        or cls.__name__ in _BY_FUNCTION
        or any(p.dim() > 1 for p in module._parameters.values() if p is not None)
    ):
        return False
    return cls.__module__ in ("transformers.activations", "torch.nn.modules.activation") or (
        _ACTIVATION.search(cls.__name__) is not None
    )
