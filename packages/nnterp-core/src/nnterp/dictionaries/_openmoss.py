"""Llama Scope, and what else OpenMOSS' Language-Model-SAEs writes: `hyperparams.json` or `config.json`, safetensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nnterp.dictionaries._files import (
    one_of,
    read_settings,
    read_weights,
    require_shapes,
    require_tensors,
    setting,
)
from nnterp.dictionaries._sites import site_of_hook
from nnterp.traced import Activation, ConstantNorm, Dictionary, JumpRelu, TopK

OLD_CONFIG, NEW_CONFIG = "hyperparams.json", "config.json"
WEIGHTS = ("sae_weights.safetensors", "checkpoints/pruned.safetensors", "checkpoints/final.safetensors")
_NAMES = {"encoder.weight": "W_E", "encoder.bias": "b_E", "decoder.weight": "W_D", "decoder.bias": "b_D"}
_THRESHOLD = "log_jumprelu_threshold"


def read_openmoss(folder: Path, name: str) -> Dictionary:
    """The dictionary of a folder.

    Raises:
        ValueError: It is damaged, or of a kind that is not read.
    """
    old = (folder / OLD_CONFIG).is_file()
    where = folder / (OLD_CONFIG if old else NEW_CONFIG)
    settings = read_settings(where)
    path = next((folder / file for file in WEIGHTS if (folder / file).is_file()), folder / WEIGHTS[0])
    tensors = _named(path, read_weights(path))
    norms = _average_norms(where, settings, tensors)
    one_of(where, "sae_type", settings.get("sae_type", "sae"), ("sae",))
    one_of(where, "use_glu_encoder", settings.get("use_glu_encoder", False), (False,))
    biased = bool(settings.get("use_decoder_bias", True))
    kind = one_of(where, "act_fn", str(settings.get("act_fn", "relu")).lower(), ("relu", "topk", "jumprelu"))
    learnt = kind == "jumprelu" and not old
    known = (*(name for name in tensors if name.startswith("dataset_average_activation_norm.")),)
    needed = ["W_E", "b_E", "W_D"] + (["b_D"] if biased else []) + ([_THRESHOLD] if learnt else [])
    require_tensors(path, tensors, needed, known)
    width, features = setting(where, settings, "d_model", int), tensors["b_E"].shape[0]
    shapes = {"W_E": (width, features), "W_D": (features, width), "b_D": (width,), _THRESHOLD: (features,)}
    require_shapes(str(path), tensors, shapes)
    reads, writes = (site_of_hook(settings.get(f"hook_point_{side}")) for side in ("in", "out"))
    token_wise = settings.get("norm_activation") == "token-wise"
    if token_wise and settings.get("hook_point_in") != settings.get("hook_point_out"):
        raise ValueError(f"{where}: a transcoder of activations that are each scaled by their norm is not read.")
    return Dictionary(
        **_folded(where, settings, tensors, norms, biased, kind, old),
        reads=reads,
        writes=writes,
        source=name,
        scaling=ConstantNorm() if token_wise else None,
        model_name=settings.get("model_name"),
        prepend_bos=True,
        transcodes=settings.get("hook_point_out") not in (None, settings.get("hook_point_in")),
    )


def _named(path: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors under their newer names; matrices that `torch.nn.Linear` holds are turned."""
    found = {}
    for name, tensor in tensors.items():
        new = name.removeprefix("activation_function.")
        found[_NAMES.get(new, new)] = tensor.T.contiguous() if new in ("encoder.weight", "decoder.weight") else tensor
    if len(found) != len(tensors):
        raise ValueError(f"{path} holds a tensor under two names: {', '.join(tensors)}.")
    return found


def _average_norms(
    where: Path, settings: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> tuple[float, float]:
    """What the activations that are read and written are multiplied with; 1 where they are not scaled as a whole."""
    way = one_of(
        where,
        "norm_activation",
        settings.get("norm_activation"),
        ("dataset-wise", "token-wise", "inference", "none", None),
    )
    if way != "dataset-wise":
        return 1.0, 1.0
    said = settings.get("dataset_average_activation_norm") or {}
    found = []
    for side in ("in", "out"):
        hook = settings.get(f"hook_point_{side}")
        norm = said.get(side, said.get(hook)) if isinstance(said, Mapping) else None
        stored = tensors.get(f"dataset_average_activation_norm.{hook}")
        norm = float(stored) if norm is None and stored is not None else norm
        if not isinstance(norm, (int, float)) or not 0 < norm < 1e30:
            raise ValueError(f"{where}: the average norm of the activations ({side}) is {norm!r:.60}.")
        found.append(setting(where, settings, "d_model", int) ** 0.5 / norm)
    return found[0], found[1]


def _folded(
    where: Path,
    settings: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    scales: tuple[float, float],
    biased: bool,
    kind: str,
    old: bool,
) -> dict[str, Any]:
    """The parts of a dictionary for activations as they are.

    In training, `x` is multiplied with `scales[0]`, what is decoded is compared with the output times `scales[1]`, and
    with `sparsity_include_decoder_norm` the features are chosen by their size times the norm of their decoder. A
    feature here is that product, and its decoder has norm 1.
    """
    given, returned = scales
    encoder, decoder = tensors["W_E"].T, tensors["W_D"]
    norms = torch.ones_like(tensors["b_E"])
    includes = settings.get("sparsity_include_decoder_norm", True)
    if includes:
        norms = decoder.norm(dim=-1).clamp(min=1e-12)
    unit = norms / returned
    zeros = torch.zeros(decoder.shape[1], dtype=decoder.dtype)
    output_bias = tensors["b_D"] / returned if biased else zeros
    threshold = settings.get("jump_relu_threshold")
    activation = Activation()
    if old and kind != "relu" and isinstance(threshold, (int, float)) and threshold > 0:
        # The old loader compares features of unit decoder norm, at the scale of the activations, with the threshold.
        scale = 1.0 if includes else given / returned
        activation = JumpRelu(torch.full_like(norms, float(threshold) * scale))
    elif kind == "jumprelu" and not old:
        activation = JumpRelu(tensors[_THRESHOLD].exp() / returned)
    elif kind == "topk":
        k = setting(where, settings, "top_k", int)
        if not 0 < k <= len(norms):
            raise ValueError(f"{where}: top_k is {k}, of {len(norms)} features.")
        activation = TopK(k)
    elif kind == "jumprelu":
        raise ValueError(f"{where}: jump_relu_threshold is {threshold!r:.40}, and a positive number was expected.")
    return {
        "encoder": (encoder * given * unit[:, None]).contiguous(),
        "encoder_bias": tensors["b_E"] * unit,
        "decoder": decoder / norms[:, None],
        "decoder_bias": output_bias,
        "activation": activation,
        "input_bias": tensors["b_D"] / given if settings.get("apply_decoder_bias_to_pre_encoder") and biased else None,
    }
