"""Find the parts of each layer: its attention or other mixer, and its feed-forward."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

from nnterp.anatomy import _names
from nnterp.anatomy._anatomy import Layer, Part
from nnterp.anatomy._messages import listed, no_layer_modules
from nnterp.anatomy._modules import children, class_name, family_name, get_child, is_moe, is_norm, sublayers
from nnterp.anatomy._rename import RenameConfig
from nnterp.anatomy._user_names import check_in_some_layer
from nnterp.errors import AnatomyError

_ATTENTION_CLASS = "Attention|Attn"
_MLP_CLASS = "MLP|Mlp|FeedForward|FFN|MoE|Moe"

# What a mixer's class name says of its kind. The first pattern that matches counts.
_KIND_OF_CLASS = (
    ("CrossAtt", "cross_attention"),
    ("Delta|Linear|Lightning|Retention|KDA", "linear_attention"),
    ("Conv", "convolution"),
    ("Recurrent|LSTM|Rwkv|^Layer$", "recurrent"),
    ("Mamba|Mixer|SSM|S6|SSD", "state_space"),
    ("Att|Attn|MLA", "attention"),
)


def find_layers(model: nn.Module, rename: RenameConfig, stack: str) -> tuple[Layer, ...]:
    """Find the parts of every layer in the list at path `stack`.

    Raises:
        AnatomyError: A name the user gave matches in no layer, or the entries of the list are no layers.
    """
    entries = children(model.get_submodule(stack))
    family = family_name(model)
    layers = tuple(
        _find_layer(index, f"{stack}.{name}", module, rename, family) for index, (name, module) in enumerate(entries)
    )
    modules = [module for _, module in entries]
    check_in_some_layer(rename, "attn_name", modules)
    check_in_some_layer(rename, "mlp_name", modules)
    if not any(layer.mixer or layer.self_attn or layer.mlp for layer in layers):
        lists = _parallel_lists(model, stack)
        if lists:
            raise AnatomyError(no_layer_modules(model, lists))
    return layers


def absent_in_layers(model: nn.Module, rename: RenameConfig, stack: str) -> dict[str, str]:
    """Why layers lack a part ("self_attn", "mixer", "mlp"): they hold several, or the user said to ignore it."""
    absent: dict[str, str] = {}
    if rename.ignore_mlp:
        absent["mlp"] = "RenameConfig(ignore_mlp=True)"
    if rename.ignore_attn:
        absent["self_attn"] = absent["mixer"] = "RenameConfig(ignore_attn=True)"
        return absent
    for _, layer in children(model.get_submodule(stack)):
        path = _locate_attention(layer, rename, family_name(model))
        module = None if path is None else layer.get_submodule(path)
        if isinstance(module, nn.ModuleList):
            reason = (
                f"a layer holds {len(module)} attentions ({path}): index them with the layer and their number in it, "
                "as in attention_head_outputs[0, 1]"
            )
            return {"self_attn": reason, **absent}
    return absent


def missing_in_layers(
    model: nn.Module, rename: RenameConfig, stack: str, layers: tuple[Layer, ...], absent: Iterable[str]
) -> list[tuple[str, str]]:
    """Parts that no layer has although it should, as (field of `RenameConfig`, what it names)."""
    first = children(model.get_submodule(stack))[0][1]
    holds = f"({stack}.0 holds {listed(first)})"
    missing = []
    if not any(layer.mixer or layer.self_attn for layer in layers) and "self_attn" not in absent:
        missing.append(("attn_name", f"the attention inside a layer {holds}"))
    if not any(layer.mlp for layer in layers) and "mlp" not in absent and _has_unknown_child(layers[0], first):
        missing.append(("mlp_name", f"the feed-forward inside a layer {holds}"))
    return missing


def _find_layer(index: int, path: str, module: nn.Module, rename: RenameConfig, family: str) -> Layer:
    kind, mixer, self_attn, mlp = "none", None, None, None
    if not rename.ignore_attn:
        kind, mixer, self_attn = _find_mixing(module, rename, family)
    if not rename.ignore_mlp:
        mlp = _part_at(module, _locate(module, rename.candidates("mlp_name"), _names.MLP, _MLP_CLASS, family))
        mlp = mlp or _span(module)
    if kind == "none" and mixer is not None:  # Nemotron-H: each layer has one `mixer`, which may be the feed-forward
        mixer, mlp = None, mlp or mixer
    return Layer(
        index,
        path,
        kind,
        mixer=_absolute(mixer, path),
        self_attn=_absolute(self_attn, path),
        mlp=_absolute(mlp, path),
        cross_attn=_absolute(_cross_attention(module, self_attn, rename), path),
        mixture_of_experts=mlp is not None and is_moe(_module_of(module, mlp)),
        attentions=() if rename.ignore_attn else _attentions(module, path),
        number=index,
    )


def _find_mixing(layer: nn.Module, rename: RenameConfig, family: str) -> tuple[str, Part | None, Part | None]:
    """The kind of a layer's mixer, the mixer, and the softmax attention.

    The kind is "none" if there is no mixer, or if the class of what has a mixer's name does not say what it is.
    """
    attention = _part_at(layer, _locate_attention(layer, rename, family))
    mixer = _part_at(layer, _locate(layer, (), _names.MIXERS, None, family))
    kind, self_attn = "none", None
    if attention is not None:
        kind = _kind(_module_of(layer, attention), family)
        if kind == "none":  # the class name says nothing, but the module's name, or the user, says attention
            kind = "attention"
        if kind == "attention":
            self_attn = attention
    if mixer is None or mixer == attention:
        return kind, attention, self_attn
    kind = _kind(_module_of(layer, mixer), family)
    if kind == "attention" and self_attn is None:
        self_attn = mixer
    return kind, mixer, self_attn


def _kind(module: nn.Module, family: str) -> str:
    """Kind of a mixer, one of `KINDS`; "none" if neither its class nor its parameters tell."""
    if any(name.startswith("time_decay") for name, _ in module.named_parameters(recurse=False)):
        return "recurrent"
    name = class_name(module, family)
    return next((kind for pattern, kind in _KIND_OF_CLASS if re.search(pattern, name)), "none")


def _locate_attention(layer: nn.Module, rename: RenameConfig, family: str) -> str | None:
    return _locate(layer, rename.candidates("attn_name"), _names.SELF_ATTN, _ATTENTION_CLASS, family)


def _locate(
    layer: nn.Module, asked: Iterable[str], known: tuple[str, ...], classes: str | None, family: str
) -> str | None:
    """The path, relative to the layer, of a part: by its name, by its name one level down, or by its class.

    Args:
        layer: The layer.
        asked: The user's names, which come first.
        known: Names the field gives to the part.
        classes: Pattern of class names. It counts only if one child alone matches.
        family: Name of the architecture, which is left out of class names.
    """
    for name in (*asked, *known):
        if get_child(layer, name) is not None:
            return name
    for outer, child in sublayers(layer):
        for name in known:
            if get_child(child, name) is not None:
                return f"{outer}.{name}"
    if classes is None:
        return None
    found = [
        name
        for name, child in layer.named_children()
        if re.search(classes, class_name(child, family)) and not is_norm(child)
    ]
    return found[0] if len(found) == 1 else None


def _cross_attention(layer: nn.Module, self_attn: Part | None, rename: RenameConfig) -> Part | None:
    """The attention of a decoder's layer to what the encoder returns, beside its attention to its own stream."""
    path = _locate(layer, (), _names.CROSS_ATTN, None, "")
    if path is None or self_attn is None or rename.ignore_attn or path == self_attn.path:
        return None
    return _part_at(layer, path)


def _part_at(layer: nn.Module, path: str | None) -> Part | None:
    """The part at a path, less the norm and the residual addition that its module may hold; None for a list."""
    if path is None:
        return None
    module = layer.get_submodule(path)
    if isinstance(module, nn.ModuleList):
        return None
    if get_child(module, "self") is not None and get_child(module, "output.dense") is not None:
        return Part(path, f"{path}.self", f"{path}.output.dense")
    if not any(is_norm(child) for child in module.children()):
        return Part.module(path)
    for inner in (*_names.SELF_ATTN, *_names.MLP):
        if get_child(module, inner) is not None:
            return Part.module(f"{path}.{inner}")
    span = _span(module)
    if span is not None:
        return Part(path, f"{path}.{span.entry}", f"{path}.{span.exit}")
    if get_child(module, _names.CLOSING_NORM) is not None:
        return Part(path, path, path, closing=f"{path}.{_names.CLOSING_NORM}")
    return Part.module(path)


def _span(module: nn.Module) -> Part | None:
    """A feed-forward without a module of its own, from its first projection to its last."""
    for first, last in _names.MLP_SPANS:
        if get_child(module, first) is not None and get_child(module, last) is not None:
            return Part(None, first, last)
    return None


def _attentions(layer: nn.Module, path: str) -> tuple[Part, ...]:
    """The attentions of a layer that keeps a list of them."""
    lists = ((name, get_child(layer, name)) for name in _names.SELF_ATTN)
    return tuple(
        Part.module(f"{path}.{name}.{i}")
        for name, module in lists
        if isinstance(module, nn.ModuleList)
        for i in range(len(module))
    )


def _absolute(part: Part | None, layer: str) -> Part | None:
    """A part whose paths are relative to a layer, with paths in the model."""
    if part is None:
        return None
    path = None if part.path is None else f"{layer}.{part.path}"
    closing = None if part.closing is None else f"{layer}.{part.closing}"
    return Part(path, f"{layer}.{part.entry}", f"{layer}.{part.exit}", closing)


def _module_of(layer: nn.Module, part: Part) -> nn.Module:
    """The module of a part with paths relative to the layer; of one without a module of its own, where it begins."""
    return layer.get_submodule(part.path or part.entry)


def _parallel_lists(model: nn.Module, stack: str) -> list[str]:
    """Names of all lists as long as that at `stack`, if there are several: lists of parts, not of layers (XLM)."""
    owner = model.get_submodule(stack.rpartition(".")[0])
    length = len(children(model.get_submodule(stack)))
    lists = [name for name, m in owner.named_children() if isinstance(m, nn.ModuleList) and len(m) == length]
    return lists if len(lists) > 1 else []


def _has_unknown_child(layer: Layer, module: nn.Module) -> bool:
    """Whether a layer's module has a child that holds weights, is no norm, and belongs to no part that was found."""
    used = [part.path or part.entry for part in (layer.mixer, layer.self_attn, layer.mlp) if part is not None]
    return any(
        not is_norm(child)
        and next(child.parameters(), None) is not None
        and not any(path.startswith(f"{layer.path}.{name}") for path in used)
        for name, child in module.named_children()
    )
