"""SAELens' format: `cfg.json` and `sae_weights.safetensors`, in the layouts before and since version 6."""

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
from nnterp.dictionaries._sites import site_of_hook, site_of_native
from nnterp.record import replace
from nnterp.traced import (
    Activation,
    ConstantNorm,
    Dictionary,
    Gated,
    GroupMax,
    JumpRelu,
    Scaling,
    TopK,
    UnitVariance,
)

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
AUTOENCODERS = ("standard", "gated", "jumprelu", "topk", "batchtopk", "matryoshka_batchtopk")
TRANSCODERS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
_BOTH = ("gated", "topk", "groupmax")
OURS = (
    "groupmax",
    *(f"{name}_transcoder" for name in _BOTH),
    *(f"{name}_skip_transcoder" for name in _BOTH),
)
_OLD_NAMES = {"hook_point": "hook_name", "activation_fn_str": "activation_fn"}
_WRITTEN = (
    *("layers_input", "layers_mid", "layers_output"),
    *("attention_contributions", "attentions_output", "mlp_contributions", "mlps_output"),
)
_SCALINGS = {"layer_norm": UnitVariance, "constant_norm_rescale": ConstantNorm}


def read_saelens(folder: Path, average_norm: float | None = None) -> Dictionary:
    """The dictionary of a folder.

    Raises:
        ValueError: It is damaged, of an architecture that is not read, or was trained on activations divided by their
            average norm, which the files do not hold and `average_norm` does not give.
    """
    where = folder / CONFIG
    given = read_settings(where)
    settings = {_OLD_NAMES.get(name, name): value for name, value in given.items()}
    about = settings.get("metadata", settings)
    if not isinstance(about, Mapping):
        raise ValueError(f"{where}: metadata is {about!r:.60}, and settings by name were expected.")
    kind = _architecture(where, settings)
    tensors = read_weights(folder / WEIGHTS)
    _require(folder / WEIGHTS, kind, tensors, settings)
    transcodes = kind.endswith("transcoder")
    if about.get("hook_head_index") is not None:
        raise ValueError(f"{where}: it reads head {about['hook_head_index']} alone; only values of all heads are read.")
    reads = site_of_native(about.get("hf_hook_name")) or site_of_hook(about.get("hook_name"))
    writes = site_of_native(about.get("hf_hook_name_out")) or site_of_hook(about.get("hook_name_out"))
    zeros = torch.zeros(tensors["W_enc"].shape[1], dtype=tensors["W_enc"].dtype)
    subtracts = not transcodes and settings.get("apply_b_dec_to_input", True)
    found = Dictionary(
        encoder=tensors["W_enc"].T.contiguous(),
        encoder_bias=zeros if kind.startswith("gated") else tensors["b_enc"],
        decoder=tensors["W_dec"],
        decoder_bias=tensors["b_dec"],
        activation=_activation(where, kind, settings, tensors),
        input_bias=tensors.get("input_bias", tensors["b_dec"] if subtracts else None),
        skip=tensors.get("W_skip"),
        reads=reads,
        writes=writes if transcodes else reads,
        scaling=_scaling(where, settings, transcodes),
        source=str(folder),
        model_name=about.get("model_name"),
        prepend_bos=about.get("prepend_bos", None if "metadata" in settings else True),
        transcodes=transcodes,
    )
    if _centred(settings) or _centred(about):
        found = _of_uncentred(where, found)
    if settings.get("rescale_acts_by_decoder_norm"):
        found = with_decoder_norms(found)
    if "scaling_factor" in tensors and settings.get("finetuning_scaling_factor"):
        found = replace(found, decoder=found.decoder * tensors["scaling_factor"][:, None])
    if settings.get("normalize_activations") in ("expected_average_only_in", True):
        if transcodes:
            raise ValueError(
                f"{where}: it is a transcoder of activations scaled by their average norm, which is not read."
            )
        if average_norm is None:
            raise ValueError(
                f"{where}: it was trained on activations scaled by their average norm, which the files do not hold. "
                "Give average_norm=, the mean norm of the activations it was trained on."
            )
        return at_average_norm(found, average_norm)
    return found


def _architecture(where: Path, settings: Mapping[str, Any]) -> str:
    function = settings.get("activation_fn", "relu")
    kind = settings.get("architecture", "standard")
    if kind == "standard" and function == "topk":
        kind = "topk"
    one_of(where, "architecture", kind, (*AUTOENCODERS, *TRANSCODERS, *OURS))
    one_of(where, "activation_fn", function, ("topk",) if kind == "topk" and function != "relu" else ("relu",))
    one_of(
        where,
        "normalize_activations",
        settings.get("normalize_activations"),
        (None, False, True, "none", "expected_average_only_in", *_SCALINGS),
    )
    kwargs = settings.get("activation_fn_kwargs") or {}
    if not isinstance(kwargs, Mapping) or kwargs.get("signed"):
        raise ValueError(f"{where}: activation_fn_kwargs is {kwargs!r:.80}, and only k is read.")
    return str(kind)


def _require(path: Path, kind: str, tensors: Mapping[str, torch.Tensor], settings: Mapping[str, Any]) -> None:
    """Raise unless the tensors are those of the architecture."""
    needed = ["W_enc", "W_dec", "b_dec"]
    needed += ["b_gate", "b_mag", "r_mag"] if kind.startswith("gated") else ["b_enc"]
    needed += ["threshold"] if kind.startswith("jumprelu") else []
    needed += ["topk_threshold"] if "batchtopk" in kind else []
    needed += ["W_skip"] if "skip" in kind else []
    require_tensors(path, tensors, needed, ["scaling_factor", "input_bias", "b_enc"])
    width, features = setting(path, settings, "d_in", int), setting(path, settings, "d_sae", int)
    output = setting(path, settings, "d_out", int) if kind.endswith("transcoder") else width
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(
        ("b_enc", "b_gate", "b_mag", "r_mag", "threshold", "scaling_factor"), (features,)
    )
    shapes |= {"W_enc": (width, features), "W_dec": (features, output), "b_dec": (output,), "W_skip": (output, width)}
    require_shapes(str(path), tensors, shapes | {"topk_threshold": (), "input_bias": (width,)})


def _activation(where: Path, kind: str, settings: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Activation:
    base = kind.removesuffix("_transcoder").removesuffix("_skip")
    if base == "gated":
        return Gated(tensors["b_gate"], tensors["b_mag"], tensors["r_mag"])
    if base == "jumprelu":
        return JumpRelu(tensors["threshold"])
    if "batchtopk" in base:
        return JumpRelu(tensors["topk_threshold"].to(tensors["W_enc"]).expand(tensors["W_enc"].shape[1]).clone())
    if base in ("topk", "groupmax"):
        k = setting(where, {"k": (settings.get("activation_fn_kwargs") or settings).get("k")}, "k", int)
        features = tensors["W_enc"].shape[1]
        if not 0 < k <= features or (base == "groupmax" and features % k):
            raise ValueError(f"{where}: k is {k}, of {features} features.")
        return TopK(k, bool(settings.get("signed"))) if base == "topk" else GroupMax(k)
    return Activation()


def _scaling(where: Path, settings: Mapping[str, Any], transcodes: bool) -> Scaling | None:
    made = _SCALINGS.get(settings.get("normalize_activations") or "none")
    return made(restores=not transcodes) if made else None


def _centred(settings: Mapping[str, Any]) -> bool:
    """Whether it was trained on a model whose weights TransformerLens had centred."""
    given = settings.get("model_from_pretrained_kwargs")
    return isinstance(given, Mapping) and bool(given.get("center_writing_weights"))


def _of_uncentred(where: Path, dictionary: Dictionary) -> Dictionary:
    """A dictionary for the stream as it is, from one for the stream less its mean over channels.

    TransformerLens' `center_writing_weights` takes that mean off all that is written to the stream. What is decoded
    stays without it; a layer norm does not see it.

    Raises:
        ValueError: It cannot be told whether what it encodes is centred, or it scales what it encodes.
    """
    if dictionary.reads is None or dictionary.scaling is not None:
        raise ValueError(
            f"{where}: it was trained with center_writing_weights, and "
            + ("the value it encodes is not known." if dictionary.reads is None else "scales what it encodes.")
        )
    if dictionary.reads.partition("[")[0] not in _WRITTEN:
        return dictionary
    encoder, bias = dictionary.encoder, dictionary.encoder_bias
    means = encoder.mean(dim=1, keepdim=True)
    if dictionary.input_bias is not None:  # the bias is not centred with the activation
        bias = bias - means[:, 0] * dictionary.input_bias.sum()
    return replace(dictionary, encoder=encoder - means, encoder_bias=bias)


def with_decoder_norms(dictionary: Dictionary) -> Dictionary:
    """The same dictionary with decoder rows of norm 1, whose features are larger by the norms that the rows had."""
    norms = dictionary.decoder.norm(dim=-1).clamp(min=1e-8)
    return replace(
        dictionary,
        encoder=dictionary.encoder * norms[:, None],
        encoder_bias=dictionary.encoder_bias * norms,
        decoder=dictionary.decoder / norms[:, None],
    )


def at_average_norm(dictionary: Dictionary, average_norm: float) -> Dictionary:
    """A dictionary for activations as they are, from one for activations whose average norm was made sqrt(width)."""
    if not isinstance(average_norm, (int, float)) or isinstance(average_norm, bool) or not 0 < average_norm < 1e30:
        raise ValueError(f"average_norm is a positive number, not {average_norm!r:.60}.")
    factor = dictionary.width**0.5 / average_norm
    shift = dictionary.input_bias
    return replace(
        dictionary,
        encoder=dictionary.encoder * factor,
        decoder=dictionary.decoder / factor,
        decoder_bias=dictionary.decoder_bias / factor,
        input_bias=None if shift is None else shift / factor,
    )
