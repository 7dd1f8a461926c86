"""Gemma Scope: `params.npz` of the first release, `params.safetensors` with `config.json` of the second."""

from __future__ import annotations

import re
from pathlib import Path

from nnterp.dictionaries._files import one_of, read_settings, read_weights, require_shapes, require_tensors
from nnterp.dictionaries._sites import site_of_native
from nnterp.traced import Dictionary, JumpRelu

FIRST, SECOND = "params.npz", "params.safetensors"
_SITES = {"res": "layers_output", "mlp": "mlp_contributions", "att": "attention_head_outputs"}


def read_first(path: Path, name: str) -> Dictionary:
    """The dictionary of a `params.npz`.

    Args:
        path: The file.
        name: Repository and folder, as in `"google/gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82"`: the files
            themselves say neither model nor layer. A folder's own path may hold them.

    Raises:
        ValueError: It is damaged, or encodes embeddings, whose scale the files do not say.
    """
    tensors = read_weights(path)
    require_tensors(path, tensors, ["W_enc", "W_dec", "b_enc", "b_dec", "threshold"])
    width, features = tensors["W_enc"].shape if tensors["W_enc"].ndim == 2 else (0, 0)
    shapes = {"W_enc": (width, features), "W_dec": (features, tensors["b_dec"].shape[0])}
    require_shapes(str(path), tensors, shapes | {"b_enc": (features,), "threshold": (features,)})
    release = re.search(r"gemma-scope-(\w+)-(pt|it)-(res|mlp|att|transcoders)\b", name)
    layer = re.search(r"layer_(\d+)", name)
    if re.search(r"(^|/)embedding(/|$)", name):
        raise ValueError(f"{path} encodes token embeddings at a scale that its files do not say; it is not read.")
    transcodes = release is not None and release[3] == "transcoders"
    value = _SITES.get(release[3]) if release else None
    reads = f"{value}[{int(layer[1])}]" if value and layer else None
    return Dictionary(
        encoder=tensors["W_enc"].T.contiguous(),
        encoder_bias=tensors["b_enc"],
        decoder=tensors["W_dec"],
        decoder_bias=tensors["b_dec"],
        activation=JumpRelu(tensors["threshold"]),
        reads=reads,
        writes=f"mlp_contributions[{int(layer[1])}]" if transcodes and layer else reads,
        source=name,
        model_name=f"google/gemma-2-{release[1]}{'-it' if release[2] == 'it' else ''}" if release else None,
        prepend_bos=True,
        transcodes=transcodes,
    )


def read_second(path: Path, name: str) -> Dictionary:
    """The dictionary of a `params.safetensors`, with the `config.json` beside it.

    Raises:
        ValueError: It is damaged, a crosscoder or a cross-layer transcoder, or of an unknown architecture.
    """
    where = path.with_name("config.json")
    settings = read_settings(where)
    one_of(where, "architecture", settings.get("architecture"), ("jump_relu",))
    tensors = read_weights(path)
    require_tensors(path, tensors, ["w_enc", "w_dec", "b_enc", "b_dec", "threshold"], ["affine_skip_connection"])
    if tensors["w_enc"].ndim != 2 or tensors["w_dec"].ndim != 2:
        raise ValueError(
            f"{path} is a crosscoder or a cross-layer transcoder (w_enc {list(tensors['w_enc'].shape)}, w_dec "
            f"{list(tensors['w_dec'].shape)}): it reads or writes several layers, and is not read as one dictionary."
        )
    (width, features), output = tensors["w_enc"].shape, tensors["b_dec"].shape[0]
    shapes = {"w_dec": (features, output), "b_enc": (features,), "threshold": (features,)}
    require_shapes(str(path), tensors, shapes | {"affine_skip_connection": (width, output)})
    skip = tensors.get("affine_skip_connection")
    reads = site_of_native(settings.get("hf_hook_point_in"))
    given = settings.get("hf_hook_point_out")
    return Dictionary(
        encoder=tensors["w_enc"].T.contiguous(),
        encoder_bias=tensors["b_enc"],
        decoder=tensors["w_dec"],
        decoder_bias=tensors["b_dec"],
        activation=JumpRelu(tensors["threshold"]),
        skip=None if skip is None else skip.T.contiguous(),
        reads=reads,
        writes=reads if given is None else site_of_native(given),
        source=name,
        model_name=settings.get("model_name"),
        prepend_bos=True,
        transcodes=given not in (None, settings.get("hf_hook_point_in")),
    )
