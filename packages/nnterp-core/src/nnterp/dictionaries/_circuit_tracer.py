"""circuit-tracer: `layer_5.safetensors`, or across layers `W_enc_5.safetensors` and `W_dec_5.safetensors`."""

from __future__ import annotations

import re
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
from nnterp.traced import Activation, CrossLayerTranscoder, Dictionary, JumpRelu, TopK

CONFIG = "config.yaml"
_THRESHOLD = "activation_function.threshold"


def read_layer(path: Path, name: str) -> Dictionary:
    """The transcoder of one layer, `layer_5.safetensors`, with the `config.yaml` beside it, if there is one.

    Raises:
        ValueError: It is damaged, or its decoder could be read in two ways.
    """
    settings = settings_beside(path)
    tensors = read_weights(path)
    require_tensors(path, tensors, ["W_enc", "W_dec", "b_enc", "b_dec"], ["W_skip", _THRESHOLD, "k"])
    features, width = tensors["b_enc"].shape[0], tensors["W_enc"].shape[-1]
    output = tensors["b_dec"].shape[0]
    if tuple(tensors["W_dec"].shape) == (output, features) and output != features:
        tensors["W_dec"] = tensors["W_dec"].T.contiguous()  # the first release, which held it turned
    shapes = {"W_enc": (features, width), "W_dec": (features, output), "W_skip": (output, width)}
    require_shapes(str(path), tensors, shapes)
    if output == features:
        raise ValueError(f"{path} has as many features as channels, so it cannot be told which axis of W_dec is which.")
    layer = re.search(r"(\d+)(?=\.safetensors$)", path.name)
    reads, writes = _sites(settings, int(layer[1]) if layer else None)
    return Dictionary(
        encoder=tensors["W_enc"],
        encoder_bias=tensors["b_enc"],
        decoder=tensors["W_dec"],
        decoder_bias=tensors["b_dec"],
        activation=_activation(path, settings, tensors, _THRESHOLD),
        skip=tensors.get("W_skip"),
        reads=reads,
        writes=writes,
        source=name,
        model_name=settings.get("model_name"),
        transcodes=True,
    )


def read_cross_layer(folder: Path, name: str) -> CrossLayerTranscoder:
    """The cross-layer transcoder of a folder.

    Raises:
        ValueError: It is damaged, or files of a layer are missing.
    """
    settings = settings_beside(folder / CONFIG)
    encoders: list[Dictionary] = []
    decoders: list[torch.Tensor] = []
    found = sorted(int(m[1]) for p in folder.iterdir() if (m := re.fullmatch(r"W_enc_(\d+)\.safetensors", p.name)))
    count = len(found)
    if found != list(range(count)) or not count:
        raise ValueError(f"{folder} holds encoders of layers {found}; those of all layers from 0 on were expected.")
    for i in range(count):
        path = folder / f"W_enc_{i}.safetensors"
        tensors = read_weights(path)
        require_tensors(path, tensors, [f"W_enc_{i}", f"b_enc_{i}", f"b_dec_{i}"], [f"threshold_{i}"])
        features, output = tensors[f"b_enc_{i}"].shape[0], tensors[f"b_dec_{i}"].shape[0]
        width = tensors[f"W_enc_{i}"].shape[-1]
        require_shapes(str(path), tensors, {f"W_enc_{i}": (features, width), f"threshold_{i}": (features,)})
        beside = folder / f"W_dec_{i}.safetensors"
        if not beside.is_file():
            raise ValueError(f"{beside} is missing, the decoder of layer {i}.")
        written = read_weights(beside)
        require_tensors(beside, written, [f"W_dec_{i}"])
        require_shapes(str(beside), written, {f"W_dec_{i}": (features, count - i, output)})
        decoder = written[f"W_dec_{i}"]
        reads, writes = _sites(settings, i)
        encoders.append(
            Dictionary(
                encoder=tensors[f"W_enc_{i}"],
                encoder_bias=tensors[f"b_enc_{i}"],
                decoder=decoder[:, 0],
                decoder_bias=tensors[f"b_dec_{i}"],
                activation=_activation(path, settings, tensors, f"threshold_{i}"),
                reads=reads,
                writes=writes,
                source=f"{name} ({i})",
                model_name=settings.get("model_name"),
                transcodes=True,
            )
        )
        decoders.append(decoder)
    first = encoders[0]
    return CrossLayerTranscoder(
        tuple(encoders),
        tuple(decoders),
        reads=first.reads.partition("[")[0] if first.reads else None,
        writes=first.writes.partition("[")[0] if first.writes else None,
        source=name,
        model_name=settings.get("model_name"),
    )


def settings_beside(path: Path) -> dict[str, Any]:
    """What the `config.yaml` in a file's folder says; nothing if there is none."""
    beside = path.with_name(CONFIG)
    return read_settings(beside) if beside.is_file() else {}


def _sites(settings: Mapping[str, Any], layer: int | None) -> tuple[str | None, str | None]:
    if layer is None:
        return None, None
    hooks = (settings.get(f"feature_{side}_hook") for side in ("input", "output"))
    reads, writes = (site_of_hook(f"blocks.{layer}.{hook}") if isinstance(hook, str) else None for hook in hooks)
    return reads, writes


def _activation(
    path: Path, settings: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], threshold: str
) -> Activation:
    """JumpReLU where there is a threshold, else what the settings say, else ReLU."""
    kind = one_of(path, "activation", settings.get("activation"), (None, "relu", "topk", "jump_relu"))
    if kind == "topk" or (kind is None and "k" in tensors):
        k = int(tensors["k"]) if "k" in tensors else setting(path.with_name(CONFIG), settings, "k", int)
        if not 0 < k <= tensors["b_enc"].shape[0]:
            raise ValueError(f"{path}: k is {k}, of {tensors['b_enc'].shape[0]} features.")
        return TopK(k, signed=True)
    if threshold in tensors and kind != "relu":
        values = tensors[threshold].flatten()
        if (values < 0).any():
            raise ValueError(
                f"{path}: some thresholds are negative, where what a feature is differs between libraries."
            )
        return JumpRelu(values)
    if kind == "jump_relu":
        raise ValueError(f"{path} is said to be a JumpReLU transcoder, and has no {threshold}.")
    return Activation()
