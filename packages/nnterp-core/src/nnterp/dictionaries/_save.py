"""`save_dictionary`: SAELens' format, with a record of the model that the dictionary belongs to."""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from nnterp.arguments import path_of
from nnterp.dictionaries._saelens import CONFIG, WEIGHTS
from nnterp.files import write_whole
from nnterp.named_transformer import NamedTransformer
from nnterp.traced import Dictionary, Gated, GroupMax, JumpRelu, TopK
from nnterp.versions import version_of

_KINDS = {Gated: "gated", JumpRelu: "jumprelu", TopK: "topk", GroupMax: "groupmax"}
_SCALINGS = {"UnitVariance": "layer_norm", "ConstantNorm": "constant_norm_rescale"}


def save_dictionary(
    dictionary: Dictionary,
    folder: str | PathLike[str],
    model: NamedTransformer | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write a dictionary as SAELens does, `cfg.json` and `sae_weights.safetensors`; `load_dictionary` reads it back.

    The values that it reads and writes are stored under nnterp's names. SAELens has no gated or TopK transcoders and no
    GroupMax: it refuses the files of these, and only nnterp reads them.

    Args:
        dictionary: The dictionary.
        folder: Where to write; made if it is not there. Files of these two names in it are replaced.
        model: The model it belongs to. Its name, commit, class, and what its certificate rests on are written too.
        dtype: The dtype of the weights in the file; None keeps that of the dictionary.

    Returns:
        The folder.

    Raises:
        TypeError: It is no dictionary.
        OSError: It cannot be written; what was there stays.

    Example:
        nnterp.save_dictionary(nnterp.toy_dictionary("residual_4"), "my-dictionary", model)
    """
    if not isinstance(dictionary, Dictionary):
        raise TypeError(f"save_dictionary() writes a Dictionary, not a {type(dictionary).__name__}.")
    folder = path_of(folder, "folder")
    kind, tensors, settings = _parts(dictionary)
    if dictionary.is_transcoder:
        base = "" if kind == "standard" else f"{kind}_"
        kind = f"{base}{'skip_' if dictionary.skip is not None else ''}transcoder"
        settings["d_out"] = dictionary.output_width
    scaling = dictionary.scaling
    config = {
        "architecture": kind,
        "d_in": dictionary.width,
        "d_sae": dictionary.num_features,
        "dtype": str(dictionary.encoder.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": _subtracts_decoder_bias(dictionary),
        "normalize_activations": "none" if scaling is None else _SCALINGS[type(scaling).__name__],
        "reshape_activations": "none",
        **settings,
        "metadata": {
            "sae_lens_version": "6.0.0",
            "model_name": dictionary.model_name,
            "hook_name": dictionary.reads,
            "hook_name_out": dictionary.writes if dictionary.is_transcoder else None,
            "prepend_bos": dictionary.prepend_bos,
            "nnterp": _record(dictionary, model),
        },
    }
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    stored = {name: tensor.clone() if dtype is None else tensor.to(dtype) for name, tensor in stored.items()}
    write_whole(folder / WEIGHTS, save(stored))
    write_whole(folder / CONFIG, (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode())
    return folder


def _parts(dictionary: Dictionary) -> tuple[str, dict[str, torch.Tensor], dict[str, Any]]:
    """Architecture, tensors and settings of the activation."""
    activation = dictionary.activation
    kind = _KINDS.get(type(activation), "standard")
    tensors = {
        "W_enc": dictionary.encoder.T,
        "W_dec": dictionary.decoder,
        "b_dec": dictionary.decoder_bias,
    }
    settings: dict[str, Any] = {}
    if isinstance(activation, Gated):
        bias = dictionary.encoder_bias
        tensors |= {
            "b_gate": activation.gate_bias + bias,
            "b_mag": activation.magnitude_bias + bias * activation.log_scale.exp(),
            "r_mag": activation.log_scale,
        }
    else:
        tensors["b_enc"] = dictionary.encoder_bias
    if isinstance(activation, JumpRelu):
        tensors["threshold"] = activation.threshold.expand(dictionary.num_features)
    if isinstance(activation, (TopK, GroupMax)):
        settings["k"] = activation.k
    if isinstance(activation, TopK) and activation.signed:
        settings["signed"] = True
    if dictionary.skip is not None:
        tensors["W_skip"] = dictionary.skip
    if dictionary.input_bias is not None and not _subtracts_decoder_bias(dictionary):
        tensors["input_bias"] = dictionary.input_bias
    return kind, tensors, settings


def _subtracts_decoder_bias(dictionary: Dictionary) -> bool:
    bias = dictionary.input_bias
    return bias is not None and not dictionary.is_transcoder and torch.equal(bias, dictionary.decoder_bias)


def _record(dictionary: Dictionary, model: NamedTransformer | None) -> dict[str, Any]:
    found: dict[str, Any] = {"source": dictionary.source, "version": version_of("nnterp-core")}
    if model is None:
        return found
    config, certificate = model._module.config, getattr(model, "certificate", None)
    return found | {
        "model": str(getattr(model, "repo_id", None) or model.model_class),
        "revision": getattr(model, "revision", None),
        "commit": getattr(config, "_commit_hash", None),
        "class": model.model_class,
        "layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "proof": model.facts.proof,
        "certificate": None if certificate is None else certificate.ok,
    }
