"""What the rules cannot serve: one row for each such model type, with the reason."""

from __future__ import annotations

from typing import Any

from ._image_rows import IMAGE_CONFIG_ROWS

_SLIDE, _FULL, _LINEAR = "sliding_attention", "full_attention", "linear_attention"

# Fields of a configuration, set after those of `_rules`. A function is called with the number of layers. "depth" is
# the default number of layers. Lists with one entry per layer are repeated to the number of layers asked for.
CONFIG_ROWS: dict[str, dict[str, Any]] = {
    **IMAGE_CONFIG_ROWS,
    # The layers of these are of one kind by default although the architecture has several.
    "granitemoehybrid": {"layer_types": [_LINEAR, _FULL, _LINEAR, _FULL], "position_embedding_type": "rope"},
    "laguna": {
        "layer_types": [_FULL, _SLIDE, _SLIDE, _FULL],
        "mlp_layer_types": ["dense", "dense", "sparse", "sparse"],
        "num_attention_heads_per_layer": [4, 4, 6, 6],  # its own feature: the number of heads depends on the layer
        "gating": True,
    },
    "lfm2": {"layer_types": ["conv", _FULL, "conv", _FULL]},
    "lfm2_moe": {"layer_types": ["conv", _FULL, "conv", _FULL]},
    "llama4_text": {"moe_layers": [1, 3], "no_rope_layers": [1, 1, 0, 0]},
    "mellum": {"layer_types": [_FULL, _SLIDE, _SLIDE, _FULL]},
    "minimax_m3_vl_text": {
        "layer_types": [_FULL, "minimax_m3_sparse", _FULL, "minimax_m3_sparse"],
        "mlp_layer_types": ["dense", "dense", "sparse", "sparse"],
    },
    "zaya": {  # its router has one expert per token
        "layer_types": ["hybrid", "hybrid_sliding", "hybrid", "hybrid_sliding"],
        "sliding_window": 8,
        "num_experts_per_tok": 1,
    },
    "cohere2_moe": {
        "mlp_layer_types": ["dense", "dense", "sparse", "sparse"],
        "layer_types": [_FULL, _SLIDE, _SLIDE, _FULL],
        "prefix_dense_intermediate_size": 120,
        "num_shared_experts": 1,
    },
    "inkling_text": {
        "layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding", "hybrid"],
        "mlp_layer_types": ["dense", "dense", "sparse", "sparse"],
    },
    # Layer kinds come from periods and index lists instead of one list per layer.
    "bamba": {"attn_layer_indices": [1, 3]},
    "gpt_neo": {"attention_types": lambda depth: [[["global", "local"], depth // 2], [["global"], depth % 2]]},
    "jamba": {"attn_layer_period": 3, "attn_layer_offset": 1, "depth": 5},
    "mllama_text_model": {"cross_attention_layers": [1, 3]},
    "qwen2_moe": {"mlp_only_layers": [0]},
    "qwen3_moe": {"mlp_only_layers": [0]},
    "qwen3_next": {"mlp_only_layers": [0]},
    # Sizes that must agree with one another in a way of their own.
    "big_bird": {"attention_type": "original_full"},  # block-sparse attention is not causal
    "bigbird_pegasus": {"attention_type": "original_full"},  # only an encoder can be block-sparse
    "blt": {"use_cache": False},  # its cache asks the configuration for num_hidden_layers, which it does not have
    "cohere_compass_text": {  # rotary parameters per layer kind, without a default; full attention has no positions
        "layer_types": [_SLIDE, _SLIDE, _FULL, _SLIDE],
        "rope_parameters": {
            _SLIDE: {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
            _FULL: None,
        },
    },
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "clip_qkv": 2.0}
    },  # both are read, neither has a default that works
    "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4}},
    "dots3_note_text": {  # sliding layers have sizes of their own, given by keywords that are no fields
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 34,
        "swa_kv_lora_rank": 26,
        "swa_head_dim": 30,
        "swa_qk_nope_head_dim": 18,
        "swa_v_head_dim": 22,
        "sliding_window": 8,
    },
    "electra": {"embedding_size": 48},  # embeddings narrower than the residual stream
    "falcon_h1": {"mlp_multipliers": [0.8, 1.3], "ssm_multipliers": [1.2, 0.8, 1.1, 0.9, 1.3]},
    "gemma3n_text": {  # shared KV layers need a producing layer of their kind below them
        "layer_types": [_SLIDE, _FULL, _SLIDE, _FULL],
        "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0],
        "num_kv_shared_layers": 2,
    },
    "gemma4_text": {"global_head_dim": 32},
    "helium": {"head_dim": 16},  # its output projection is hidden_size by hidden_size
    "dory": {  # the layers between the first two and the last two run in a loop
        "depth": 6,
        "n_input_layers": 2,
        "n_output_layers": 2,
        "n_recurrent_layers": lambda depth: depth - 4,
        "n_recurrent_loops": 3,
    },
    "inkling2_loop_text": {  # each loop begins and ends with a block of layers
        "depth": 6,
        "n_layers_per_attn_res_block": 2,
        "loop_layer_index_start": 2,
        "loop_layer_index_end": 4,
    },
    "hrm_text": {"depth": 2, "embedding_scale": 3.0},  # two stacks of this depth, run 16 layers in all
    "longcat_flash": {"head_dim": 12, "zero_expert_num": 2},  # head_dim is the rotary part of a head
    "mamba2": {"num_heads": 8, "head_dim": 16},  # num_heads * head_dim == expand * hidden_size
    "qwen2_5_vl_text": {  # sections of the rotary half of a head: time, height, width
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
    },
    "qwen2_vl_text": {  # as above
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
    },
    "qwen4_exp_text": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 6,
        "indexer_compress_ratio": 3,
        "ple_layer_ids": [1],
        "ple_embed_dim": 64,
        "heads_per_ngram": 2,
        "ngram_vocab_size_base": 50,
        "make_ngram_vocab_size_divisible_by": 4,
        "split_ngram_parts": 2,
    },
    "reformer": {
        "axial_pos_shape": (16, 32),
        "axial_pos_embds_dim": (24, 40),
    },
    "xlm": {"causal": True},  # one class is both the encoder and the decoder
    "xlstm": {"hidden_size": 128, "chunk_size": 64},  # its query size is a multiple of 64 and half the hidden size
    "xmod": {"default_language": "en_XX"},  # no language, no adapter, no forward
    "zamba": {"attention_head_dim": 32, "layers_block_type": [_LINEAR, "hybrid", _LINEAR, "hybrid"]},
    "zamba2": {"layers_block_type": [_LINEAR, "hybrid", _LINEAR, "hybrid"]},
}

# Factors on parameters, by the end of their name, where attention is not scaled by the square root of the head size.
LOUD_ROWS: dict[str, dict[str, float]] = {
    "dory": {"sqk": 0.25},  # a factor on queries, squared, that is initialised to a fiftieth
    "gemma3n_text": {"q_norm.weight": 0.5},  # scale 1
    "gemma4_text": {"q_norm.weight": 0.4},  # scale 1
    "gemma4_unified_text": {"q_norm.weight": 0.4},  # scale 1
    "gpt_neo": {"q_proj.weight": 0.3},  # scale 1
    "mllama_text_model": {"attn_gate": 12.0, "mlp_gate": 12.0},  # of cross-attention, zero at first
    "inkling_text": {"q_norm.weight": 3.0},  # scale 1 / head size
    "inkling2_text": {"q_norm.weight": 1.5},  # scale 1 / head size
    "inkling2_loop_text": {"q_norm.weight": 1.5},  # scale 1 / head size
}

_NEEDS_AN_IMAGE = "its forward takes no text without an image, and the certificate begins with a text"
_ENCODER = "an encoder reads the prompt, and the decoder's own tokens come beside it: it is no model of one stream"
NEEDS_TIMM = (
    "its vision tower needs the packages timm, torchvision and Pillow, which the extra `llms` installs: "
    "pip install 'nnterp[llms]'"
)

# Encoder-decoder types that are built as well.
ENCODER_DECODERS: tuple[str, ...] = (
    *("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "longt5", "m2m_100", "marian", "mbart", "mt5"),
    *("mvp", "nllb-moe", "pegasus", "plbart", "seamless_m4t", "seamless_m4t_v2", "switch_transformers", "t5"),
    *("t5gemma", "umt5", "whisper"),
)
# Types with images in and text out that are not built with their images, each with the reason.
WITHOUT_IMAGES: dict[str, str] = {
    "blip": _NEEDS_AN_IMAGE,
    "blip-2": _NEEDS_AN_IMAGE,
    "chameleon": "its forward sets the logits of its image tokens to the lowest number, whatever its head returns",
    "diffusion_gemma": "it denoises blocks of tokens, and does not predict the next token",
    "evolla": "it reads proteins, and AutoModelForImageTextToText does not build it",
    "fast_vlm": NEEDS_TIMM,
    "florence2": _ENCODER,
    "gemma3n": NEEDS_TIMM,
    "git": "it puts an image in front of the text, where no token stands: its stream is longer than the prompt",
    "idefics": _NEEDS_AN_IMAGE,
    "instructblip": _NEEDS_AN_IMAGE,
    "instructblipvideo": _NEEDS_AN_IMAGE,
    "kosmos-2": _NEEDS_AN_IMAGE,
    "mistral4": "it takes no images: the mapping lists its language model",
    "perception_lm": NEEDS_TIMM,
    "pi0": "it predicts a robot's actions, and no tokens",
    "pix2struct": _ENCODER,
    "pp_formulanet": _ENCODER,
    "t5gemma2": _ENCODER,
    "udop": _ENCODER,
    "vision-encoder-decoder": _ENCODER,
}

# Types with images whose forward fails on every prompt in one release of transformers: the release, and the reason.
FAIL_IN: dict[str, tuple[str, str]] = {
    "llama4": (
        "5.24.0",
        "in transformers 5.24.0 its forward fails on every prompt: it reads image_outputs of what its language model "
        "returns, which has none",
    ),
}

# Members of the causal-LM mapping that no configuration makes a working text model.
UNAVAILABLE: dict[str, str] = {
    "gemma3n": (
        "its vision tower needs the packages timm, torchvision and Pillow (the extra `llms`: pip install "
        "'nnterp[llms]'), and its config takes no other tower; gemma3n_text is the language model alone"
    ),
    "gemma4_assistant": "a drafting head: its forward requires the embeddings and key-value states of a target model",
    "gemma4_unified_assistant": (
        "a drafting head: its forward requires the embeddings and key-value states of a target model"
    ),
    "musicgen": (
        "the mapping gives MusicgenForCausalLM, which takes a MusicgenDecoderConfig, the composite MusicgenConfig: "
        "AutoModelForCausalLM.from_config fails on a missing field. Built by hand it is refused: it reads 4 rows of "
        "audio codes as one sequence, so rows of its input are no rows of its residual stream"
    ),
    "musicgen_melody": (
        "the mapping gives MusicgenMelodyForCausalLM, which takes a MusicgenMelodyDecoderConfig, the "
        "composite MusicgenMelodyConfig: AutoModelForCausalLM.from_config fails on a missing field. Built by hand it "
        "is refused: it reads 4 rows of audio codes as one sequence, so rows of its input are no rows of its residual "
        "stream"
    ),
}
