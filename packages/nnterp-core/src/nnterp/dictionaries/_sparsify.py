"""EleutherAI's sparsify: `cfg.json` and `sae.safetensors`, in a folder that is named after a module."""

from __future__ import annotations

from pathlib import Path

import torch

from nnterp.dictionaries._files import (
    one_of,
    read_settings,
    read_weights,
    require_shapes,
    require_tensors,
    setting,
)
from nnterp.dictionaries._sites import sites_of_module
from nnterp.traced import Dictionary, GroupMax, TopK

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"


def read_sparsify(folder: Path, name: str) -> Dictionary:
    """The dictionary of a folder.

    Args:
        folder: The folder.
        name: Where it is from; its last part is the module's name, as in `"owner/repository/layers.5.mlp"`.

    Raises:
        ValueError: It is damaged, or has settings that are not read.
    """
    where = folder / CONFIG
    settings = read_settings(where)
    for unread in ("signed", "jumprelu", "n_targets", "n_sources"):
        if settings.get(unread):
            raise ValueError(f"{where}: {unread} is {settings[unread]!r:.40}, which is not read.")
    kind = one_of(where, "activation", settings.get("activation", "topk"), ("topk", "groupmax"))
    transcodes, skips = bool(settings.get("transcode")), bool(settings.get("skip_connection"))
    width, k = setting(where, settings, "d_in", int), setting(where, settings, "k", int)
    features = settings.get("num_latents") or width * setting(where, settings, "expansion_factor", int)
    path = folder / WEIGHTS
    tensors = read_weights(path)
    needed = ["encoder.weight", "encoder.bias", "W_dec", "b_dec"] + (["W_skip"] if skips else [])
    require_tensors(path, tensors, needed)
    shapes = {"encoder.weight": (features, width), "encoder.bias": (features,), "W_skip": (width, width)}
    require_shapes(str(path), tensors, shapes | {"W_dec": (features, width), "b_dec": (width,)})
    if not 0 < k <= features or (kind == "groupmax" and features % k):
        raise ValueError(f"{where}: k is {k}, of {features} features.")
    module = sites_of_module(Path(name).name)
    reads, writes = module or (None, None)
    given = folder.parent / "config.json"
    run = read_settings(given) if given.is_file() else {}
    dense: torch.Tensor | None = None if transcodes else tensors["b_dec"]
    return Dictionary(
        encoder=tensors["encoder.weight"],
        encoder_bias=tensors["encoder.bias"],
        decoder=tensors["W_dec"],
        decoder_bias=tensors["b_dec"],
        activation=TopK(k) if kind == "topk" else GroupMax(k),
        input_bias=dense,
        skip=tensors.get("W_skip"),
        reads=reads if transcodes else writes,
        writes=writes,
        source=name,
        model_name=run.get("model"),
        transcodes=transcodes,
    )
