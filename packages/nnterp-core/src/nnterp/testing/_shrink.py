"""Rules that turn the configuration of any model type into a tiny one.

A rule speaks of one configuration field, whatever the model. What a rule cannot serve is a row in ``_exceptions``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from ._exceptions import CONFIG_ROWS
from ._tokenizer import RESERVED_TOKEN_IDS, VOCAB_SIZE

HIDDEN = 64
HEADS = 4
KV_HEADS = 2
HEAD_DIM = 24  # HEADS * HEAD_DIM != HIDDEN, wherever the head size is a field of its own
INTERMEDIATE = 112
MOE_INTERMEDIATE = 40
SHARED_INTERMEDIATE = 56
EXPERTS = 6
POSITIONS = 512
WINDOW = 8
MIN_LAYERS = 4
TOWER_LAYERS = 3  # of an image or audio tower: fewer than the text has, so that the two are not mistaken


def _fields(value: Any, names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split(), value)


# Value of a field, unless its default is None (see _FROM_NONE) or a bool.
RULES: dict[str, Any] = {
    # sizes of the residual stream and of attention
    **_fields(
        HIDDEN,
        "hidden_size d_model embed_dim n_embd emb_dim embedding_dim embedding_size word_embed_proj_dim lru_width",
    ),
    **_fields(HIDDEN, "output_hidden_size backbone_hidden_size out_hidden_size projector_output_dim"),
    **_fields(HEADS, "num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads"),
    **_fields(HEADS, "encoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads"),
    **_fields(KV_HEADS, "num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads"),
    **_fields(HEAD_DIM, "head_dim kv_channels dim_head attention_head_size global_head_dim swa_head_dim"),
    **_fields(HIDDEN // HEADS, "d_head d_kv"),
    **_fields(HEADS, "swa_num_attention_heads"),
    # multi-head latent attention and sparse-attention indexers
    "q_lora_rank": 36,
    "kv_lora_rank": 28,
    "qk_nope_head_dim": 18,
    "qk_rope_head_dim": 12,
    "qk_head_dim": 30,
    "v_head_dim": 20,
    "o_lora_rank": 32,
    "o_groups": 2,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": 6,
    "index_block_size": 3,
    "index_topk_blocks": 2,
    "rotary_dim": 8,
    "hidden_size_global": HIDDEN,
    # feed-forward sizes
    **_fields(INTERMEDIATE, "intermediate_size ffn_dim n_inner d_ff d_inner dim_ff dff ffn_hidden_size mlp_dim"),
    **_fields(INTERMEDIATE, "decoder_ffn_dim encoder_ffn_dim feed_forward_size dense_intermediate_size"),
    **_fields(INTERMEDIATE + 8, "intermediate_size_mlp prefix_dense_intermediate_size"),
    **_fields(MOE_INTERMEDIATE, "moe_intermediate_size expert_ffn_hidden_size"),
    **_fields(SHARED_INTERMEDIATE, "shared_expert_intermediate_size shared_experts_intermediate_size"),
    **_fields(SHARED_INTERMEDIATE, "shared_intermediate_size moe_shared_expert_intermediate_size"),
    # experts
    **_fields(EXPERTS, "num_experts num_local_experts n_routed_experts moe_num_experts"),
    **_fields(2, "num_experts_per_tok num_experts_per_token moe_k moe_topk moe_top_k top_k_experts"),
    **_fields(2, "n_group num_expert_group"),
    **_fields(1, "topk_group n_shared_experts num_shared_experts moe_num_shared_experts"),
    "router_hidden_size": 44,
    # vocabulary and positions
    **_fields(VOCAB_SIZE, "vocab_size vocab_size_per_layer_input decoder_vocab_size"),
    **_fields(POSITIONS, "max_position_embeddings n_positions n_ctx max_seq_len context_length max_target_positions"),
    **_fields(POSITIONS, "model_max_length max_source_positions"),
    # windows that bite on a prompt of a dozen tokens
    **_fields(WINDOW, "sliding_window sliding_window_size attention_window_size local_attention window_size"),
    **_fields(WINDOW, "attention_chunk_size local_attention_window_len"),
    "floor_scale": 4,
    # state-space, convolution and linear-attention mixers
    **_fields(10, "state_size ssm_state_size mamba_d_state"),
    **_fields(3, "conv_kernel mamba_d_conv conv1d_width linear_conv_kernel_dim short_conv_kernel_size conv_L_cache"),
    **_fields(3, "conv_kernel_size ple_conv_kernel_size"),
    **_fields(8, "chunk_size mamba_chunk_size block_size"),
    **_fields(5, "time_step_rank mamba_dt_rank"),
    **_fields(8, "mamba_n_heads mamba_num_heads n_mamba_heads"),
    **_fields(16, "mamba_d_head mamba_head_dim mamba_headdim"),
    **_fields(2, "n_groups mamba_n_groups mamba_ngroups"),
    "mamba_d_ssm": 128,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_num_heads": 4,
    "linear_head_dim": 12,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 14,
    "input_embedding_size": 48,
    "output_embedding_size": 52,
    "prompt_length": 5,
    "position_bias_num_buckets": 32,
    "position_bias_max_distance": 128,
    # side inputs: glyph embeddings, hashed byte groups, modality towers
    "pronunciation_vocab_size": 37,
    "pronunciation_embed_dim": 20,
    "shape_vocab_size": 41,
    "shape_embed_dim": 22,
    "encoder_hash_byte_group_vocab": 503,
    **_fields(HIDDEN, "adapter_in_dim adapter_out_dim adapter_input_size output_channels"),
    **_fields(24, "nemo_conv_channels ext_pw_out_channel depthwise_separable_out_channel"),
    "image_size": 32,
    # low ranks
    **_fields(10, "adapter_rank laurel_rank gated_norm_rank hc_lowrank"),
    "hidden_size_per_layer_input": 14,
    # periods of layer patterns
    **_fields(1, "first_k_dense_replace num_dense_layers moe_layer_start_index"),
    "n_layers_per_attn_res_block": 2,
    # caps, scales and multipliers that show on loud weights
    **_fields(4.0, "final_logit_softcapping logits_soft_cap output_logit_soft_cap"),
    **_fields(2.0, "attn_logit_softcapping"),
    "logit_scale": 0.75,
    **_fields(1.7, "logits_scaling logits_mup_width_multiplier"),
    "embedding_multiplier": 1.5,
    "residual_multiplier": 0.7,
    "attention_multiplier": 0.3,
    **_fields(0.8, "lm_head_multiplier attention_in_multiplier ssm_in_multiplier"),
    **_fields(1.2, "attention_out_multiplier ssm_out_multiplier key_multiplier"),
    "dim_model_base": 96,
    "query_pre_attn_scalar": 20,
    # decoders that default to being encoders
    "is_decoder": True,
}

# Fields whose default None means "derived from other fields", set nevertheless.
_FROM_NONE = frozenset(
    [
        "num_key_value_heads",
        "num_kv_heads",
        "head_dim",
        "q_lora_rank",
        "n_group",
        "topk_group",
        "n_inner",
        "n_routed_experts",
        "num_experts_per_tok",
        "n_shared_experts",
    ]
)

# Lists with one entry per layer, and names of the number of layers.
_LAYER_LISTS = [
    "layer_types",
    "mlp_layer_types",
    "no_rope_layers",
    "indexer_types",
    "layers_block_type",
    "attn_layers",
    "activation_sparsity_pattern",
    "num_attention_heads_per_layer",
    "layer_rope_theta",
]
_DEPTHS = [
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "decoder_layers",
    "encoder_layers",
    "num_blocks",
    "num_decoder_layers",
    "num_encoder_layers",
    "depth",
]

# Keywords that every configuration takes, to be given to the outermost one.
_EVERYWHERE = frozenset({"attn_implementation", "experts_implementation", "dtype"})


def tiny_config(model_type: str, *, num_layers: int | None = None, **overrides: Any) -> PreTrainedConfig:
    """The configuration ``tiny_model`` builds from; see there for the parameters."""
    return _tiny(CONFIG_MAPPING[model_type], {}, num_layers, overrides)


def _tiny(
    config_class: type[PreTrainedConfig],
    parent_row: Mapping[str, Any],
    num_layers: int | None,
    overrides: dict[str, Any],
) -> PreTrainedConfig:
    row = {**CONFIG_ROWS.get(config_class.model_type, {}), **parent_row}
    defaults = {field.name: field.default for field in dataclasses.fields(config_class)}
    full = _full_size(config_class)
    overrides = {config_class.attribute_map.get(name, name): value for name, value in overrides.items()}
    depth = num_layers or next((overrides[name] for name in _DEPTHS if name in overrides), None)

    sub_configs = _sub_configs(config_class)
    text = next((key for key in ("text_config", "decoder") if key in sub_configs), None)
    deeper = {key: overrides.pop(key) for key in sub_configs if isinstance(overrides.get(key), Mapping)}
    if text is not None and not any(name in defaults for name in _DEPTHS):
        below = [name for name in overrides if name not in defaults and name not in _EVERYWHERE]
        deeper[text] = {**deeper.get(text, {}), **{name: overrides.pop(name) for name in below}}

    values = {name: _ruled(name) for name, default in defaults.items() if _has_rule(name, default)}
    if "kv_lora_rank" in defaults:  # latent attention expands to one key and one value per query head
        values["num_key_value_heads"] = HEADS
    if full is not None and isinstance(getattr(full, "rope_parameters", None), dict):
        values["rope_parameters"] = tiny_rope(full.rope_parameters)

    stated = {name: getattr(full, name, None) for name in _LAYER_LISTS if name in defaults}
    stated.update({name: value for name, value in {**row, **overrides}.items() if name in _LAYER_LISTS})
    lists = {name: value for name, value in stated.items() if isinstance(value, (list, tuple)) and len(value)}
    if depth is None:
        depth = next((len(overrides[name]) for name in _LAYER_LISTS if overrides.get(name)), None)
    picked = cover(lists)
    if depth is None:
        depth = row.get("depth", max(MIN_LAYERS, len(picked)))
    values.update({name: depth for name in _DEPTHS if name in defaults})

    for key, (sub_class, optional) in sub_configs.items():
        if key not in overrides and not (optional and key not in row and key not in deeper):
            sub_layers = TOWER_LAYERS if key.startswith(("vision", "audio")) else num_layers if key == text else None
            values[key] = _tiny(sub_class, row.get(key, {}), sub_layers, deeper.get(key, {}))

    for name, value in row.items():
        if name not in sub_configs and name != "depth":
            values[name] = value(depth) if callable(value) else value
    values.update(overrides)
    for name, value in lists.items():
        kinds = [value[i] for i in picked]
        values[name] = type(value)(kinds[i % len(kinds)] for i in range(depth))
    return config_class(**values)


def _full_size(config_class: type[PreTrainedConfig]) -> PreTrainedConfig | None:
    try:
        return config_class()
    except Exception:  # its own defaults do not pass its own validation
        return None


def _sub_configs(config_class: type[PreTrainedConfig]) -> dict[str, tuple[type[PreTrainedConfig], bool]]:
    """Name -> (class, whether the composite does without it) of the configurations inside a composite one."""
    found = {}
    for key, sub_class in config_class.sub_configs.items():
        spec = config_class.sub_configs_defaults.get(key)
        if not issubclass(sub_class, PreTrainedConfig):  # AutoConfig
            sub_class = CONFIG_MAPPING[spec.model_type]
        found[key] = (sub_class, spec is not None and spec.optional)
    return found


def _has_rule(name: str, default: Any) -> bool:
    if name.endswith(("_token_id", "_token_index")):
        return isinstance(default, (int, list)) or name in ("eos_token_id", "bos_token_id", "pad_token_id")
    if name == "is_decoder":  # the one bool
        return True
    return name in RULES and not isinstance(default, bool) and (default is not None or name in _FROM_NONE)


def _ruled(name: str) -> Any:
    if name.endswith(("_token_id", "_token_index")):
        return RESERVED_TOKEN_IDS.get(name.rpartition("_token_")[0], RESERVED_TOKEN_IDS["other"])
    return RULES[name]


def cover(lists: Mapping[str, Sequence[Any]], at_least: int = MIN_LAYERS) -> list[int]:
    """Indices of layers, in order, in which every kind of layer that the lists tell apart occurs."""
    kinds = list(zip(*(map(str, value) for value in lists.values()), strict=False))
    picked = {kinds.index(kind) for kind in kinds}
    rest = (i for i in range(len(kinds)) if i not in picked)
    picked.update(islice(rest, max(0, at_least - len(picked))))
    return sorted(picked)


def tiny_rope(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary parameters of the same kind for a context of ``POSITIONS`` tokens."""
    rope = {key: tiny_rope(value) if isinstance(value, Mapping) else value for key, value in rope.items()}
    if "original_max_position_embeddings" in rope:
        rope["original_max_position_embeddings"] = max(WINDOW, int(POSITIONS / rope.get("factor", 4)))
    if "max_position_embeddings" in rope:
        rope["max_position_embeddings"] = POSITIONS
    return rope


# Fields whose rule would change what the layers are, or how many heads there are.
_KEPT_NARROW = frozenset(
    [
        *(name for name, value in RULES.items() if value in (HEADS, KV_HEADS) and "head" in name and "dim" not in name),
        *("floor_scale", "is_decoder", "first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"),
        *("n_layers_per_attn_res_block", "n_shared_experts", "num_shared_experts", "moe_num_shared_experts"),
        *("dim_model_base", "query_pre_attn_scalar", "linear_num_key_heads", "linear_num_value_heads"),
        *(name for name, value in RULES.items() if isinstance(value, float)),
    ]
)
_WIDTH = "hidden_size"
_STATE_HEADS = (
    ("mamba_n_heads", "mamba_d_head"),
    ("mamba_num_heads", "mamba_head_dim"),
    ("n_mamba_heads", "mamba_headdim"),
    ("num_heads", "head_dim"),
)


def narrow_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """A configuration of the same architecture, as deep and with as many heads, but narrow: small enough to run.

    Kinds of layers, heads, caps, scales and multipliers are the configuration's own; widths, the vocabulary and the
    number of experts are those of a tiny model.

    Raises:
        Exception: Whatever the configuration's own validation makes of it.
    """
    data = config.to_dict()
    aliases = {native: name for name, native in config.attribute_map.items()}

    def stated(*names: str) -> int:
        values = (data.get(config.attribute_map.get(name, name)) for name in names)
        return max((v for v in values if isinstance(v, int) and not isinstance(v, bool)), default=0)

    heads = stated("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads")
    old_width = stated(_WIDTH, "d_model", "n_embd", "embed_dim")
    if data.get("expand") and data.get("state_size"):  # heads of a state space: many, and as narrow as can be
        width = 2 * HIDDEN
    else:
        width = heads * (8 if heads >= 32 else 16) if heads else HIDDEN
    for key in config.sub_configs:
        inner = getattr(config, key, None)
        if isinstance(inner, PreTrainedConfig):
            data[key] = narrow_config(inner).to_dict()
    for name, value in data.items():
        if name in config.sub_configs or aliases.get(name, name) in _KEPT_NARROW or name in _KEPT_NARROW:
            continue
        rule = name in RULES or name.endswith(("_token_id", "_token_index"))
        if not rule or value is None or isinstance(value, (bool, float, str, dict)):
            continue
        new = _ruled(name)
        if isinstance(value, list) and not isinstance(new, list):
            new = [new] if name.endswith("_token_id") else value
        data[name] = width if new == HIDDEN and value == old_width else new
    if data.get("kv_lora_rank"):  # latent attention: what is called the head's size is its rotary part
        data["head_dim"] = data.get("qk_rope_head_dim", data.get("head_dim"))
    elif isinstance(data.get("head_dim"), int) and heads:
        data["head_dim"] = width // heads
    expand = next((data[name] for name in ("mamba_expand", "expand") if data.get(name)), None)
    for n_heads, d_head in _STATE_HEADS:
        if expand and data.get(n_heads) and d_head in data:  # its heads share out the expanded stream
            data[d_head] = int(expand * width) // data[n_heads]
            if data.get("mamba_d_ssm"):
                data["mamba_d_ssm"] = data[d_head] * data[n_heads]
            break
    if isinstance(data.get("rope_parameters"), dict):
        data["rope_parameters"] = _narrow_rope(tiny_rope(data["rope_parameters"]), width // heads if heads else None)
    data.pop("auto_map", None)
    data["dtype"] = "float32"
    return type(config).from_dict(data)


def _narrow_rope(rope: dict[str, Any], head_dim: int | None) -> dict[str, Any]:
    """Sections of the rotary half of a head must add up to it."""
    rope = {k: _narrow_rope(v, head_dim) if isinstance(v, dict) else v for k, v in rope.items()}
    sections = rope.get("mrope_section")
    if sections and head_dim:
        half = int(head_dim * rope.get("partial_rotary_factor", 1.0)) // 2
        small = [max(1, s * half // sum(sections)) for s in sections]
        small[0] += half - sum(small)
        rope["mrope_section"] = small
    return rope
