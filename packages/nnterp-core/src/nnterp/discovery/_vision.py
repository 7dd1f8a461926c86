"""The vision tower of a model: which lists of modules may be its layers, by structure alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from nnterp.anatomy import Anatomy
from nnterp.discovery._recording import Labels

# Towers of other senses, and generators of images, which a prompt with an image does not run.
_OTHER = re.compile(r"(^|\.)(audio|speech|video_tower|vqmodel|generation)")
_ATTENTION = ("self_attn", "attn", "attention", "self_attention")


@dataclass(frozen=True)
class Vision:
    """What a run with an image proved of a model.

    Attributes:
        layers: Paths of the layers of the vision tower whose output reaches the language model.
        attentions: Paths of their attentions; empty if not every layer has one.
        projector: The module that returns what stands at the image's tokens.
        tokens: Ids of the tokens at which an image stands; empty where the language model attends to it.
        joined: Layers of the language model after which the tower adds to the stream at the image's tokens.
        copies: Whether a batch of copies of one prompt gives each what the prompt gives alone.
        reasons: Value → why it is not served.
        ticks: (module, (), "input" or "output") → when the run with the image reached it, on its own clock.
    """

    layers: tuple[str, ...] = ()
    attentions: tuple[str, ...] = ()
    projector: str | None = None
    tokens: frozenset[int] = frozenset()
    joined: tuple[int, ...] = ()
    copies: bool = False
    reasons: Mapping[str, str] = field(default_factory=dict)
    ticks: Mapping[tuple[str, Labels, str], int] = field(default_factory=dict, repr=False)


def vision_stacks(module: nn.Module, anatomy: Anatomy) -> list[tuple[str, ...]]:
    """The paths of the modules in each list that may be the layers of a tower, those with most weights first.

    They are the outermost lists outside of the language model's layers whose entries hold an attention.
    """
    decoder = f"{anatomy.layers}."
    found: list[tuple[int, tuple[str, ...]]] = []
    outer: list[str] = []
    for path, inner in module.named_modules():
        if not isinstance(inner, nn.ModuleList) or not len(inner) or f"{path}.".startswith(decoder):
            continue
        if _OTHER.search(path) or any(path.startswith(f"{other}.") for other in outer):
            continue
        if all(attention_of(layer) is not None for layer in inner):
            outer.append(path)
            weights = sum(parameter.numel() for parameter in inner.parameters())
            found.append((weights, tuple(f"{path}.{name}" for name, _ in inner.named_children())))
    return [stack for _, stack in sorted(found, key=lambda entry: -entry[0])]


def attention_of(layer: nn.Module) -> str | None:
    """The name of the attention in a layer of a tower; None if there is none, or no telling which it is."""
    children = dict(layer.named_children())
    named = [name for name in _ATTENTION if name in children]
    if not named:
        named = [name for name, child in children.items() if "attention" in type(child).__name__.lower()]
    return named[0] if len(named) == 1 else None
