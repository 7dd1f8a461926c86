"""Find the model's own parts: its list of layers, embedding, unembedding and final norm."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

from nnterp.anatomy import _messages, _names
from nnterp.anatomy._modules import ancestors, children, get_child, is_norm, path_of, recorded_classes
from nnterp.anatomy._rename import RenameConfig
from nnterp.anatomy._user_names import backbones, path_asked_for
from nnterp.errors import AnatomyError
from nnterp.huggingface import is_encoder_decoder

# Side towers of multimodal models, which may hold larger stacks than the text decoder.
_SIDE = re.compile(r"(^|\.)(vision|visual|image|audio|speech|encoder_hash|patcher)")


def find_stack(model: nn.Module, rename: RenameConfig) -> tuple[str, tuple[str, ...]]:
    """Find the list of layers whose residual stream makes the logits.

    Returns:
        Its path, and the paths of the stacks that run before it on streams of their own (BLT).

    Raises:
        AnatomyError: There is no such list, or no telling which of several it is, or the user's name for it is wrong.
    """
    asked = path_asked_for(model, rename, "layers_name", backbones(model, rename))
    if asked is not None:
        if not children(model.get_submodule(asked)):
            raise AnatomyError(
                f"RenameConfig(layers_name={asked!r}) names a module without children, not a list of layers."
            )
        return asked, ()
    stacks = _likely_stacks(model)
    if not stacks:
        raise AnatomyError(_messages.no_layers(model))
    if len(stacks) > 1 and len({_last_name(path) for path in stacks}) == 1:
        return (stacks[0], ()) if stacks_in_turn(model) else _decoder_among(model, stacks)
    return max(stacks, key=lambda path: sum(p.numel() for p in model.get_submodule(path).parameters())), ()


def stacks_in_turn(model: nn.Module) -> tuple[str, ...]:
    """The lists of layers of a model that runs several of them in turn, cycle after cycle (HRM); else empty.

    Such a model says how many cycles there are, and its stacks are modules of one class.
    """
    stacks = _likely_stacks(model)
    owners = {type(model.get_submodule(path.rpartition(".")[0])) for path in stacks}
    cycles = any(name.lower().endswith("_cycles") for name in vars(model.config))
    return tuple(stacks) if cycles and len(stacks) > 1 and len(owners) == 1 else ()


def _likely_stacks(model: nn.Module) -> list[str]:
    """The lists of layers, narrowed down by one clue after another. A clue that fits none of them is ignored."""
    recorded = recorded_classes(model, "hidden_states")
    decoder = _decoder_prefix(model)
    clues = (
        lambda path: any(isinstance(layer, recorded) for layer in model.get_submodule(path)),
        lambda path: path.startswith(decoder),
        lambda path: not _SIDE.search(path),
        lambda path: _last_name(path) in _names.LAYERS,
    )
    stacks = list(_lists_of_layers(model))
    for fits in clues:
        stacks = [path for path in stacks if fits(path)] or stacks
    return stacks


def _lists_of_layers(model: nn.Module) -> Iterator[str]:
    """Outermost ModuleLists whose entries hold modules of their own, of more than one class."""
    outer: list[str] = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) == 0:
            continue
        if any(path.startswith(f"{other}.") for other in outer):
            continue
        if all(children(layer) for layer in module):
            outer.append(path)
            if len({type(child) for layer in module for child in _inside(layer)}) > 1:
                yield path


def _inside(layer: nn.Module) -> Iterator[nn.Module]:
    """The children of a layer, and of a list that it holds (T5) the entries."""
    for child in layer.children():
        yield from child if isinstance(child, nn.ModuleList) else (child,)


def find_encoder_stack(model: nn.Module) -> str | None:
    """The path of the list of layers of the encoder that an encoder-decoder model declares; None if there is none."""
    try:
        encoder = model.get_encoder()
    except (NotImplementedError, AttributeError):
        return None
    path = path_of(model, encoder)
    stacks = [stack for stack in _lists_of_layers(model) if path and stack.startswith(f"{path}.")]
    return max(stacks, key=lambda stack: len(children(model.get_submodule(stack))), default=None)


def _decoder_prefix(model: nn.Module) -> str:
    """What the paths inside the decoder that the model declares begin with; "" if it declares none with lists."""
    try:
        decoder = model.get_decoder()
    except (NotImplementedError, AttributeError):
        return ""
    path = path_of(model, decoder)
    return f"{path}." if path and any(isinstance(m, nn.ModuleList) for m in decoder.modules()) else ""


def _decoder_among(model: nn.Module, stacks: list[str]) -> tuple[str, tuple[str, ...]]:
    """Of several stacks in a chain, the decoder: its stream makes the logits. (The certificate tests this.)"""
    decoders = [path for path in stacks if "decoder" in path]
    if len(decoders) == 1 and not getattr(model.config, "is_encoder_decoder", False):
        return decoders[0], tuple(path for path in stacks if path != decoders[0])
    raise AnatomyError(_messages.several_stacks(model, stacks))


def find_embedding(model: nn.Module) -> str | None:
    """Find the input embedding: what the model declares, or else the first `nn.Embedding`, known names first.

    Raises:
        AnatomyError: The model embeds its input with several tables.
    """
    prefix = _decoder_prefix(model) if is_encoder_decoder(model) else ""
    if prefix:
        embeddings = (p for p, m in model.named_modules() if isinstance(m, nn.Embedding) and p.startswith(prefix))
        return next((p for p in embeddings if _last_name(p) in _names.EMBED_TOKENS), None)
    try:
        module = model.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        module = None
    path = path_of(model, module)
    if isinstance(module, nn.ModuleList):
        raise AnatomyError(_messages.several_embeddings(model, path, len(module)))
    if path is not None:
        return path
    found = [p for p, m in model.named_modules() if isinstance(m, nn.Embedding)]
    named = [p for p in found if _last_name(p) in _names.EMBED_TOKENS]
    return next(iter(named or found), None)


def find_head(model: nn.Module, rename: RenameConfig, stack: str) -> str | None:
    """Find the unembedding: the user's name, what the model declares, or a known name.

    Raises:
        AnatomyError: The user's name matches nothing.
    """
    asked = path_asked_for(model, rename, "lm_head_name", ("", *backbones(model, rename)))
    if asked is not None:
        return asked
    try:
        module = model.get_output_embeddings()
    except (NotImplementedError, AttributeError):
        module = None
    path = path_of(model, module)
    if path is None:  # beside the layers, or in a language model that stands whole inside another model
        beside = (f"{owner}.{name}".lstrip(".") for owner in ("", *ancestors(stack)) for name in _names.LM_HEAD)
        path = next((name for name in beside if get_child(model, name) is not None), None)
    # BERT's head is a transform and a projection: the head is the outermost module around them without the layers.
    while path is not None and "." in path and not stack.startswith(path.rpartition(".")[0] + "."):
        path = path.rpartition(".")[0]
    return path


def find_norm(model: nn.Module, rename: RenameConfig, stack: str, head: str | None) -> str | None:
    """Find the norm after the last layer: the user's name, or a norm with a known name in a module around the layers.

    Raises:
        AnatomyError: The user's name matches nothing.
    """
    owners = list(ancestors(stack))
    asked = path_asked_for(model, rename, "ln_final_name", (*owners, *backbones(model, rename)))
    if asked is not None:
        return asked
    for owner in owners:
        module = model.get_submodule(owner)
        for name in _names.LN_FINAL:
            child = get_child(module, name)
            path = f"{owner}.{name}" if owner else name
            if child is not None and path != head and is_norm(child):
                return path
    return None


def _last_name(path: str) -> str:
    return path.rpartition(".")[2]
