"""1.x's checks of a renamed model's shapes. A `StandardizedTransformer` proves more by itself: `model.validate()`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from loguru import logger
from torch import nn

from nnterp.anatomy import RenameConfig
from nnterp.errors import RenamingError

_FIELDS = {"ln_final": "ln_final_name", "lm_head": "lm_head_name"}
_PARTS = {"self_attn": ("attention", "attn_name"), "mlp": ("mlp", "mlp_name")}


def get_ignores(model: nn.Module, rename_config: RenameConfig | None = None) -> list[str]:
    """Find the parts that are no module in a model's layers: in OPT's, and those the user says.

    Args:
        model: The HuggingFace module.
        rename_config: What the user says of it.

    Returns:
        Some of "mlp" and "attention".
    """
    ignores = []
    if type(model).__name__ == "OPTForCausalLM":
        logger.warning("OPT has no mlp module; use mlps_input[i] and mlps_output[i], or layers[i].fc1 and .fc2")
        ignores.append("mlp")
    if rename_config is not None and rename_config.ignore_mlp:
        ignores.append("mlp")
    if rename_config is not None and rename_config.ignore_attn:
        ignores.append("attention")
    return ignores


def check_model_renaming(
    std_model: Any, model_name: str, ignores: Iterable[str], allow_dispatch: bool, allow_multimodal: bool = False
) -> None:
    """Check that a renamed model has the standard names, and that what they name has the stream's shape.

    Args:
        std_model: A `StandardizedTransformer`, or an nnsight model with the standard names.
        model_name: What errors call it.
        ignores: Parts that are not looked for: "mlp", "attention".
        allow_dispatch: Whether weights may be loaded for it.
        allow_multimodal: Whether the layers may be of several classes.

    Raises:
        RenamingError: A name is missing, or a shape is another; says which.
    """
    ignores = list(ignores)
    if not hasattr(std_model, "layers"):
        raise RenamingError(f"{model_name} has no layers: name the list of layers with RenameConfig(layers_name=...).")
    classes = sorted({type(layer._module).__name__ for layer in std_model.layers})
    if len(classes) > 1 and not allow_multimodal:
        raise RenamingError(
            f"The layers of {model_name} are of several classes ({', '.join(classes)}); some may run only on an image. "
            "Pass allow_multimodal=True."
        )
    for name, field in _FIELDS.items():
        if not hasattr(std_model, name):
            raise RenamingError(f"{model_name} has no {name}: name it with RenameConfig({field}=...).")
    for name, (part, field) in _PARTS.items():
        if part not in ignores and not hasattr(std_model.layers[0], name):
            raise RenamingError(f"The layers of {model_name} have no {name}: name it with RenameConfig({field}=...).")
    ids = torch.tensor([[0, 1, 1]])
    if allow_dispatch or std_model.dispatched:
        std_model.dispatch()
        with torch.no_grad(), std_model.trace(ids):
            check_io(std_model, model_name, ignores)
        return
    with std_model.scan({"input_ids": ids}):
        check_io(std_model, model_name, ignores)


def check_io(std_model: Any, model_name: str, ignores: Iterable[str]) -> None:
    """Check, inside a trace, that values of the first layer, of the norm and of the head have the shapes they should.

    Args:
        std_model: A `StandardizedTransformer`.
        model_name: What errors call it.
        ignores: Parts that are not looked at: "mlp", "attention".

    Raises:
        RenamingError: The hidden size is unknown.
        ValueError: A value has another shape; says which, and what it should be.
    """
    hidden = std_model.hidden_size
    if hidden is None:
        raise RenamingError(
            f"The hidden size of {model_name} is unknown; give it, or its config field, with "
            "RenameConfig(hidden_size_config_key=...)."
        )
    ignores, stream = set(ignores), (*std_model.input_size, hidden)
    _require_shape(model_name, "token_embeddings", std_model.token_embeddings, stream)
    _require_shape(model_name, "layers_input[0]", std_model.layers_input[0], stream)
    if "attention" not in ignores:
        _require_shape(model_name, "attentions_input[0]", std_model.attentions_input[0], stream)
        _require_shape(model_name, "attentions_output[0]", std_model.attentions_output[0], stream)
    if "mlp" not in ignores:
        _require_shape(model_name, "mlps_input[0]", std_model.mlps_input[0], stream)
        _require_shape(model_name, "mlps_output[0]", std_model.mlps_output[0], stream)
    _require_shape(model_name, "layers_output[0]", std_model.layers_output[0], stream)
    _require_shape(model_name, "ln_final.output", std_model.ln_final.output, stream)
    logits = std_model.lm_head.output
    _require_shape(model_name, "lm_head.output", logits, (*stream[:2], std_model.vocab_size or logits.shape[-1]))


def _require_shape(model_name: str, label: str, tensor: Any, shape: tuple[int, ...]) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{label} of {model_name} is a {type(tensor).__name__}, not a tensor.")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{label} of {model_name} has shape {list(tensor.shape)}; it should be {list(shape)}.")
