"""A configuration made narrow: the same architecture and depth as the original, with tiny widths."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from ._rules import HEADS, HIDDEN, KV_HEADS, RULES, has_rule, tiny_rope, value_by_rule

# Fields whose rule would change what the layers are, or how many heads there are.
_KEPT = frozenset(
    [
        *(name for name, value in RULES.items() if value in (HEADS, KV_HEADS) and "head" in name and "dim" not in name),
        *("floor_scale", "is_decoder", "first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"),
        *("n_layers_per_attn_res_block", "n_shared_experts", "num_shared_experts", "moe_num_shared_experts"),
        *("dim_model_base", "query_pre_attn_scalar", "linear_num_key_heads", "linear_num_value_heads"),
        *(name for name, value in RULES.items() if isinstance(value, float)),
    ]
)
_STATE_HEADS = (
    ("mamba_n_heads", "mamba_d_head"),
    ("mamba_num_heads", "mamba_head_dim"),
    ("n_mamba_heads", "mamba_headdim"),
    ("num_heads", "head_dim"),
)


def narrow_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """A configuration of the same architecture, as deep and with as many heads, but narrow: small enough to run.

    Kinds of layers, heads, caps, scales and multipliers are those of `config`. Widths, the vocabulary and the number of
    experts are those of a tiny model.

    Raises:
        Exception: Whatever the configuration class raises if the narrow values do not pass its validation.
    """
    data = config.to_dict()
    heads = _stated(config, data, "num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads")
    width = _narrow_width(data, heads)
    data.update(_narrow_parts(config))
    data.update(_narrow_fields(config, data, width))
    data.update(_attention_head_size(data, width, heads))
    data.update(_state_head_size(data, width))
    if isinstance(data.get("rope_parameters"), dict):
        data["rope_parameters"] = _narrow_rope(tiny_rope(data["rope_parameters"]), width // heads if heads else None)
    data.pop("auto_map", None)
    data["dtype"] = "float32"
    return type(config).from_dict(data)


def _stated(config: PreTrainedConfig, data: dict[str, Any], *names: str) -> int:
    """The largest integer among the named fields; 0 if there is none."""
    values = (data.get(config.attribute_map.get(name, name)) for name in names)
    return max((v for v in values if isinstance(v, int) and not isinstance(v, bool)), default=0)


def _narrow_width(data: dict[str, Any], heads: int) -> int:
    """Width of the residual stream of the narrow model."""
    if data.get("expand") and data.get("state_size"):  # a state-space model: it has many heads, so they are narrow
        return 2 * HIDDEN
    return heads * (8 if heads >= 32 else 16) if heads else HIDDEN


def _narrow_parts(config: PreTrainedConfig) -> dict[str, Any]:
    """The configurations inside a composite one, made narrow."""
    parts = ((key, getattr(config, key, None)) for key in config.sub_configs)
    return {key: narrow_config(part).to_dict() for key, part in parts if isinstance(part, PreTrainedConfig)}


def _narrow_fields(config: PreTrainedConfig, data: dict[str, Any], width: int) -> dict[str, Any]:
    """The fields that the rules set. A field that had the width of the residual stream gets the narrow `width`."""
    old_width = _stated(config, data, "hidden_size", "d_model", "n_embd", "embed_dim")
    aliases = {native: name for name, native in config.attribute_map.items()}
    fields = {}
    for name, value in data.items():
        if name in config.sub_configs or name in _KEPT or aliases.get(name, name) in _KEPT:
            continue
        if not has_rule(name) or value is None or isinstance(value, (bool, float, str, dict)):
            continue
        new = value_by_rule(name)
        if isinstance(value, list) and not isinstance(new, list):
            new = [new] if name.endswith("_token_id") else value
        fields[name] = width if new == HIDDEN and value == old_width else new
    return fields


def _attention_head_size(data: dict[str, Any], width: int, heads: int) -> dict[str, Any]:
    if data.get("kv_lora_rank"):  # in latent attention `head_dim` is the rotary part of a head
        return {"head_dim": data.get("qk_rope_head_dim", data.get("head_dim"))}
    if isinstance(data.get("head_dim"), int) and heads:
        return {"head_dim": width // heads}
    return {}


def _state_head_size(data: dict[str, Any], width: int) -> dict[str, Any]:
    """The head size of a state-space mixer: its heads share the expanded stream equally."""
    expand = next((data[name] for name in ("mamba_expand", "expand") if data.get(name)), None)
    for number, size in _STATE_HEADS:
        if expand and data.get(number) and size in data:
            narrow = int(expand * width) // data[number]
            return {size: narrow} | ({"mamba_d_ssm": narrow * data[number]} if data.get("mamba_d_ssm") else {})
    return {}


def _narrow_rope(rope: dict[str, Any], head_dim: int | None) -> dict[str, Any]:
    """Shrink the sections of the rotary half of a head so that they add up to its narrow size."""
    rope = {k: _narrow_rope(v, head_dim) if isinstance(v, dict) else v for k, v in rope.items()}
    sections = rope.get("mrope_section")
    if sections and head_dim:
        half = int(head_dim * rope.get("partial_rotary_factor", 1.0)) // 2
        small = [max(1, s * half // sum(sections)) for s in sections]
        small[0] += half - sum(small)
        rope["mrope_section"] = small
    return rope
