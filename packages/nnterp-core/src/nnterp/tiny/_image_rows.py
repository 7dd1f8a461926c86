"""What the rules cannot serve in models that take images: rows for configurations, and for prompts."""

from __future__ import annotations

from typing import Any

import torch


def _sections(*sections: int, **fields: Any) -> dict[str, Any]:
    """Rotary parameters whose half head is divided among time, height and width."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [*sections], **fields}}


_WINDOWS = {"window_size": 32, "fullatt_block_indexes": [1]}  # of 32 pixels: 2 by 2 patches that are merged
_TILES = {"image_grid_pinpoints": [[64, 32], [32, 64]], "image_seq_length": 16}
_POOLED = {"mm_tokens_per_image": 4}
_TILED_LIST = {"image_size": [32, 32], "patch_size": [8, 8]}

# Fields of configurations, as in `_special_cases.CONFIG_ROWS`.
IMAGE_CONFIG_ROWS: dict[str, dict[str, Any]] = {
    "apertus1p5": {"image_token_id": 4, "audio_token_id": 5, "image_token_offset": 100, "audio_token_offset": 132},
    "apertus1p5_vision_tokenizer": {"codebook_size": 32, "base_channels": 32, "channel_multiplier": [1, 1, 2]},
    "aria": {"projector_patch_to_query_dict": {16: 5}},
    "cosmos3_edge_text": _sections(4, 4, 4),
    "deepseek_ocr2_sam_vision_model": {"downsample_channels": [24, 64], "output_channels": 24},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]},
    "emu3": {  # images become tokens of a codebook, which the vocabulary holds
        "vocabulary_map": {
            "<image>": 4,
            "<|extra_200|>": 99,
            **{f"<|visual token {i:06d}|>": 100 + i for i in range(32)},
        }
    },
    "emu3_vqgan": {"codebook_size": 32, "base_channels": 32, "channel_multiplier": [1, 1, 2]},
    "ernie4_5_vl_moe_text": {**_sections(3, 3, 2), "moe_intermediate_size": [40, 24]},
    "exaone4_5_vision": _WINDOWS,
    "gemma3": _POOLED,
    "gemma3n_vision": {"hidden_size": 2048},  # the tower is one of timm's, and has its own size
    "gemma4_unified_vision": {"patch_size": 4, "mm_embed_dim": 64, "mm_posemb_size": 64, "output_proj_dims": 64},
    "gemma4": {"vision_config": {}},
    "gemma4_unified": {"vision_config": {}},
    "glm4v_moe_text": _sections(2, 1, 1, partial_rotary_factor=0.5),
    "glm4v_text": _sections(4, 2, 2),
    "glm5_next_text": {"index_kpool": 2, "qk_rope_head_dim": 0, "head_dim": 0, "qk_head_dim": 18},
    "glm_ocr_text": _sections(4, 2, 2),
    "granite4_vision": {
        **_TILES,
        "downsample_rate": "1/2",
        "deepstack_layer_map": [[0, 0], [1, 1]],
        "spatial_target_layers": [0, 1, 2, 3],
        "projector_dropout": 0.0,
    },
    "hy_v4_vl_text": _sections(2, 2, 2),
    "hunyuan_vl_text": _sections(3, 3, 3, 3),
    "idefics2": {"perceiver_config": {"resampler_n_latents": 5}},
    "internvl_vision": _TILED_LIST,
    "janus_vqgan": {"num_embeddings": 32, "base_channels": 32, "channel_multiplier": [1, 1, 2]},
    "kosmos-2.5": {"latent_query_num": 6},
    "kosmos_2_5_vision_model": {"max_num_patches": 16},
    "llama4_vision_model": {"intermediate_size": 256, "vision_output_dim": 64},  # four pixels are put side by side
    "llava_next": _TILES,
    "llava_next_video": _TILES,
    "llava_onevision": _TILES,
    "minicpm_ocr": {"image_token_id": 4, "video_token_id": 5},
    "minicpmv4_6": {"image_token_id": 4, "video_token_id": 5},
    "minicpmv4_7": {"image_token_id": 4, "video_token_id": 5},
    "mllama_vision_model": {"num_global_layers": 2, "intermediate_layers_indices": [0, 2], "vision_output_dim": 192},
    "molmo2_vision": {"image_size": [32, 32]},
    "molmo2": {"image_patch_id": 4},
    "molmo2_adapter": {"vision_feature_layer": [2, 0]},
    "muse_glimmer": {"out_hidden_size": 256},  # four patches are put side by side
    "muse_spark": {"out_hidden_size": 256},
    "muse_spark_audio": {"depth": 4, "hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 1, 1]},
    "nemotron_h_omni": {"image_token_id": 4, "video_token_id": 5, "vision_config": {"video_temporal_patch_size": 2}},
    "paddleocr_vl_text": _sections(4, 4, 4),
    "qianfan_ocr_vision": _TILED_LIST,
    "qwen2_5_omni_text": _sections(4, 2, 2),
    "qwen2_5_omni_vision_encoder": _WINDOWS,
    "qwen2_5_vl_vision": _WINDOWS,
    "qwen2_5_omni_thinker": {"vision_start_token_id": 7},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 7},
    "qwen3_omni_moe_audio_encoder": {"output_dim": 64},
    "shieldgemma2": _POOLED,
    "muse_glimmer_text": {"output_multiplier": 0.7},
    "muse_spark_text": {"moe_hidden_size": 48, "output_multiplier": 0.7},
    "unlimited_ocr_sam_vision_model": {"downsample_channels": [24, 64], "output_channels": 24},
    "step3p5": {"sliding_window": 8},
    "vipllava": {"vision_feature_layers": [-2, -1]},
    "wavtokenizer_encoder": {"codebook_size": 32, "codebook_dim": 64, "decoder_hidden_size": 64, "num_filters": 4},
}


def _mask_of_tiles(made: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.ones(made["pixel_values"].shape[:2], dtype=torch.bool)


# Prompts with an image, by model type. "form" is a key of `_image_inputs`' forms, "tokens" the number of positions of
# an image, "without" names arguments to leave out, and "extra" makes more of them; sizes are those of `_Vision`.
IMAGE_ROWS: dict[str, dict[str, Any]] = {
    "apertus1p5": {"form": "sized", "image_size": 16, "tokens": 16},
    "granite4_vision": {"form": "tiled", "tiles": 3, "shape": [60, 30]},
    "granite_docling": {"extra": {"pixel_attention_mask": _mask_of_tiles}},
    "kimi_k25": {"form": "square patches"},
    "emu3": {"form": "sized", "image_size": 16, "tokens": 20},
    "kosmos-2.5": {"form": "flattened patches", "tokens": 6},
    "deepseek_vl_hybrid": {"form": "two resolutions"},
    "fuyu": {"form": "listed patches", "tokens": 6},
    "gemma4_unified": {"patch_size": 12},
    "inkling2": {"form": "blocks"},
    "inkling2_loop": {"form": "blocks"},
    "inkling_mm_model": {"form": "frames", "patch_size": 40, "frames": 2},
    "llama4": {"tokens": 4},
    "minicpm_ocr": {"form": "row of patches"},
    "minicpmv4_6": {"form": "row of patches"},
    "minicpmv4_7": {"form": "row of patches"},
    "mllama": {"form": "attended tiles", "tokens": 1},
    "molmo2": {"form": "pooled patches"},
    "nemotron_h_omni": {"form": "grid"},
    "paddleocr_vl": {"form": "square patches"},
    "video_llama_3": {"form": "merged patches"},
    "llava": {"form": "square"},
    "llava_next": {"form": "tiled", "tiles": 3, "shape": [60, 30]},
    "llava_next_video": {"form": "tiled", "tiles": 3, "shape": [60, 30]},
    "llava_onevision": {"form": "tiled", "tiles": 3, "shape": [60, 30]},
}
