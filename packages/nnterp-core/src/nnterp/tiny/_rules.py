"""One rule per configuration field: the value that makes a model tiny, whatever the architecture.

What no rule can serve is a row in `_special_cases`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

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
TOWER_LAYERS = 3  # of an image or audio tower: fewer than the text decoder has, so that tests can tell them apart


def _fields(value: Any, names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split(), value)


# Value of each field. A field whose default is a bool, or None (but see `_FROM_NONE`), is left alone.
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
    **_fields(VOCAB_SIZE, "vocab_size vocab_size_per_layer_input decoder_vocab_size unpadded_vocab_size"),
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
    **_fields(24, "downsample_hidden_size"),
    "image_size": 32,
    "patch_size": 8,
    "deepstack_visual_indexes": [0, 1],
    **_fields(HIDDEN, "projection_dim text_hidden_size projector_input_dim projection_hidden_dim vision_hidden_size"),
    **_fields(HIDDEN, "projection_hidden_size"),
    **_fields(96, "projector_hidden_size projection_intermediate_size alignment_intermediate_size"),
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

# Fields that are set although their default is None, which means "derived from other fields".
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

_TOKEN_ENDINGS = ("_token_id", "_token_index")
# Fields whose rule is about images, and holds only in configurations with one of these other fields.
_ONLY_WITH = {"patch_size": {"num_channels", "in_channels", "image_size"}}


def replaces_default(name: str, default: Any, beside: Collection[str] = ()) -> bool:
    """Whether a rule sets a field that has this default value, in a configuration with these other fields."""
    if name in _ONLY_WITH and not _ONLY_WITH[name].intersection(beside):
        return False
    if name.endswith(_TOKEN_ENDINGS):
        return isinstance(default, (int, list)) or name in ("eos_token_id", "bos_token_id", "pad_token_id")
    if name == "is_decoder":  # the only bool that is set
        return True
    if isinstance(default, (list, tuple)) and not isinstance(
        RULES.get(name), (list, tuple)
    ):  # one entry for each stage
        return False
    return name in RULES and not isinstance(default, bool) and (default is not None or name in _FROM_NONE)


def has_rule(name: str) -> bool:
    """Whether there is a rule about the field."""
    return name in RULES or name.endswith(_TOKEN_ENDINGS)


def value_by_rule(name: str) -> Any:
    """The tiny value of a field. Token ids are those of `tiny_tokenizer`.

    Raises:
        KeyError: No rule is about this field.
    """
    if name.endswith(_TOKEN_ENDINGS):
        return RESERVED_TOKEN_IDS.get(name.rpartition("_token_")[0], RESERVED_TOKEN_IDS["other"])
    return RULES[name]


def tiny_rope(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary parameters of the same kind for a context of `POSITIONS` tokens."""
    rope = {key: tiny_rope(value) if isinstance(value, Mapping) else value for key, value in rope.items()}
    if "original_max_position_embeddings" in rope:
        rope["original_max_position_embeddings"] = max(WINDOW, int(POSITIONS / rope.get("factor", 4)))
    if "max_position_embeddings" in rope:
        rope["max_position_embeddings"] = POSITIONS
    return rope
