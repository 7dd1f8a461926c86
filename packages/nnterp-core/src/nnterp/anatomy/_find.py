"""Find a model's parts: by the user's names, then by what transformers declares, then by structure and known names."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from types import MappingProxyType
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from nnterp.anatomy._anatomy import Anatomy, Layer
from nnterp.anatomy._layer_parts import absent_in_layers, find_layers, missing_in_layers
from nnterp.anatomy._messages import describe_missing, listed
from nnterp.anatomy._model_parts import (
    find_embedding,
    find_encoder_stack,
    find_head,
    find_norm,
    find_stack,
    stacks_in_turn,
)
from nnterp.anatomy._modules import ancestors
from nnterp.anatomy._rename import RenameConfig
from nnterp.anatomy._sizes import Sizes, head_width, inner_width, read_sizes
from nnterp.errors import AnatomyError
from nnterp.huggingface import is_encoder_decoder


def find_anatomy(model: nn.Module, rename_config: RenameConfig | None = None) -> Anatomy:
    """Find which module of a HuggingFace causal LM plays which part. Nothing is run; weights may be on `meta`.

    Args:
        model: The model, e.g. what `AutoModelForCausalLM.from_pretrained` returns.
        rename_config: Names that come before everything nnterp would guess.

    Returns:
        The native paths of the parts. They are a claim, which `nnterp.certificate` proves by running the model.

    Raises:
        AnatomyError: A name in `rename_config` matches nothing, or a part that every causal LM has was not found. The
            message says which field of `RenameConfig` to set, and shows the modules to choose from.
    """
    rename = rename_config or RenameConfig()
    stack, other_stacks = find_stack(model, rename)
    in_turn = stacks_in_turn(model)
    if rename.layers_name is not None and stack not in in_turn:  # one that takes turns stands for all that do
        in_turn = ()
    layers = _numbered(layer for path in in_turn or (stack,) for layer in find_layers(model, rename, path))
    head = find_head(model, rename, stack)
    norm = find_norm(model, rename, (in_turn or (stack,))[-1], head)
    embedding = find_embedding(model)

    absent = absent_in_layers(model, rename, stack)
    missing = missing_in_layers(model, rename, stack, layers, absent)
    if head is None:
        missing.append(("lm_head_name", f"the unembedding; the model's modules: {listed(model)}"))
    if missing:
        raise AnatomyError(describe_missing(model, missing))
    if norm is None:
        absent["ln_final"] = "no norm follows the last layer"
    if embedding is None:
        absent["embed_tokens"] = "the model declares no input embedding"
    anatomy = Anatomy(
        model_class=type(model).__name__,
        model_type=getattr(model.config, "model_type", ""),
        embed_tokens=embedding,
        layers=stack,
        ln_final=norm,
        lm_head=head,
        blocks=layers,
        sizes=_sizes(model, rename, layers, head, _config_of_layers(model, stack, other_stacks)),
        absent=MappingProxyType(absent),
        other_stacks=other_stacks,
        in_turn=in_turn[1:],
    )
    return dataclasses.replace(anatomy, encoder=_encoder_of(model, anatomy)) if is_encoder_decoder(model) else anatomy


def _numbered(layers: Iterable[Layer]) -> tuple[Layer, ...]:
    """Layers, of several lists, with their place among all."""
    return tuple(dataclasses.replace(layer, index=i, number=i) for i, layer in enumerate(layers))


def _encoder_of(model: nn.Module, decoder: Anatomy) -> Anatomy | None:
    """The parts of an encoder-decoder model's encoder."""
    stack = find_encoder_stack(model)
    if stack is None:
        return None
    rename = RenameConfig()
    layers = find_layers(model, rename, stack)
    return dataclasses.replace(
        decoder,
        layers=stack,
        blocks=layers,
        ln_final=find_norm(model, rename, stack, None),
        lm_head=None,
        embed_tokens=None,
        sizes=dataclasses.replace(decoder.sizes, num_layers=len(layers)),
        absent=MappingProxyType({"lm_head": "an encoder has no head", "embed_tokens": "it may share the decoder's"}),
        other_stacks=(),
        encoder=None,
    )


def _config_of_layers(model: nn.Module, stack: str, other_stacks: tuple[str, ...]) -> Any:
    """The config that describes the layers: of a stack among several, that of the innermost module with one."""
    if not other_stacks:
        return model.config
    owners = (model.get_submodule(path) for path in ancestors(stack))
    return next(owner.config for owner in owners if isinstance(getattr(owner, "config", None), PreTrainedConfig))


def _sizes(model: nn.Module, rename: RenameConfig, layers: tuple[Layer, ...], head: str | None, config: Any) -> Sizes:
    """The sizes the config states, the head's width, and the feed-forward's, which GPT-2 and others do not state."""
    sizes = read_sizes(config, len(layers), rename)
    width = None if head is None else head_width(model.get_submodule(head))
    if width is not None and rename.vocab_size_config_key is None:
        sizes = dataclasses.replace(sizes, vocab_size=width)
    if sizes.intermediate_size is not None or sizes.hidden_size is None:
        return sizes
    plain = [layer.mlp for layer in layers if layer.mlp is not None and not layer.mixture_of_experts]
    modules = (
        [m for path in dict.fromkeys((mlp.entry, mlp.exit)) for m in model.get_submodule(path).modules()]
        for mlp in plain
    )
    return dataclasses.replace(sizes, intermediate_size=inner_width(modules, sizes.hidden_size))
