"""Which model types lack a property that callers of transformers 5.24 expect, such as exact left padding, and why.

Measured on the models of `tiny_model` with the default (sdpa) attention implementation. Unless a reason mentions sizes,
it holds for real checkpoints too.
"""

from __future__ import annotations

_NO_POSITION_IDS = "positions are counted from the start of the row, and forward takes no position_ids"
_INDEXER = "its indexer picks keys without regard to the padding; exact for prompts up to index_topk tokens"
_SDPA_MASK = (
    "without token_type_ids, sdpa attends an unpadded batch in both directions, but a padded one (and eager attention "
    "any batch) causally"
)
_STATE = "the recurrent state runs through the padding"

NOT_CAUSAL: dict[str, str] = {
    "cpmant": "attends in both directions over the whole text",
    "paligemma": _SDPA_MASK,
    "prophetnet": (
        "the position bias of its predicting stream is reshaped across positions, so that a position's bias comes from "
        "the states of other positions, later ones included"
    ),
    "xlnet": "attends in both directions unless a perm_mask is passed",
}
"""Model types in which changing a token changes the logits of earlier tokens, each with the reason."""

LEFT_PADDING_INEXACT: dict[str, str] = {
    "axk2": _INDEXER,
    "bart": _NO_POSITION_IDS,
    "bigbird_pegasus": _NO_POSITION_IDS,
    "blenderbot": _NO_POSITION_IDS,
    "blenderbot-small": _NO_POSITION_IDS,
    "blt": "byte patches are cut from the padded row",
    "deepseek_v32": _INDEXER,
    "deepseek_v4": "compressed blocks of keys are cut from the start of the padded row",
    "dots3_note": _INDEXER,
    "dots3_note_text": _INDEXER,
    "glm_moe_dsa": _INDEXER,
    "hy_v4": _INDEXER,
    "hy_v4_vl": _INDEXER,
    "llama4": "the attention temperature follows the index in the padded row, not position_ids",
    "llama4_text": "the attention temperature follows the index in the padded row, not position_ids",
    "marian": _NO_POSITION_IDS,
    "mbart": _NO_POSITION_IDS,
    "minimax_m3_vl": "blocks of keys are cut from the start of the padded row",
    "minimax_m3_vl_text": "blocks of keys are cut from the start of the padded row",
    "mistral_large4": _INDEXER,
    "mvp": _NO_POSITION_IDS,
    "paligemma": _SDPA_MASK,
    "pegasus": _NO_POSITION_IDS,
    "plbart": _NO_POSITION_IDS,
    "prophetnet": _NO_POSITION_IDS,
    "recurrent_gemma": _STATE,
    "rwkv": _STATE,
    "trocr": _NO_POSITION_IDS,
    "whisper": _NO_POSITION_IDS,
    "xlm": "its causal mask leaves the attention_mask out",
    "xlstm": _STATE,
}
"""Model types whose logits for a left-padded row differ from those for the row alone, each with the reason.

They differ even if the attention mask is passed, and position_ids computed from it.
"""

POSITION_IDS_NEEDED: frozenset[str] = frozenset(
    [
        "bert",
        "bert-generation",
        "big_bird",
        "biogpt",
        "ctrl",
        "dory",
        "electra",
        "ernie",
        "git",
        "gpt-sw3",
        "gpt2",
        "gpt_bigcode",
        "gpt_neo",
        "hunyuan_v1_dense",
        "hunyuan_v1_moe",
        "hunyuan_vl",
        "megatron-bert",
        "openai-gpt",
        "reformer",
        "rembert",
        "roc_bert",
        "xglm",
    ]
)
"""Model types that give a left-padded row the logits of the row alone only if `position_ids` are passed.

The `position_ids` have to be computed from the attention mask.
"""

POSITION_IDS_OFFSET: frozenset[str] = frozenset(
    [
        "camembert",
        "data2vec-text",
        "kosmos-2.5",
        "roberta",
        "roberta-prelayernorm",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xmod",
    ]
)
"""Model types that count positions from `padding_idx + 1`. Pass no `position_ids`: `input_ids` are enough."""

_STEPWISE_INDEXER = "keys picked step by step differ from those picked for a whole row; exact up to index_topk tokens"

CACHE_INEXACT: dict[str, str] = {
    "axk2": _STEPWISE_INDEXER,
    "bamba": "positions start again at 0 unless position_ids are passed",
    "blt": "its cache asks the configuration for num_hidden_layers, which it does not have",
    "cpmant": "it wants the whole row again along with the cache",
    "deepseek_v32": _STEPWISE_INDEXER,
    "dots3_note": _STEPWISE_INDEXER,
    "dots3_note_text": _STEPWISE_INDEXER,
    "glm5_next": _STEPWISE_INDEXER,
    "glm_moe_dsa": _STEPWISE_INDEXER,
    "hy_v4": _STEPWISE_INDEXER,
    "hy_v4_vl": _STEPWISE_INDEXER,
    "mistral_large4": _STEPWISE_INDEXER,
    "moshi": "its cache keeps the sliding window, which its forward over a whole row does not apply",
    "paligemma": _SDPA_MASK,
    "prophetnet": NOT_CAUSAL["prophetnet"],
    "rwkv": "given one token a row, it mixes the rows of a batch; exact for one row",
}
"""Model types for which going on from `past_key_values` (or `state`) differs from one forward pass over the whole row.

Each with the reason, found by feeding one token at a time.
"""

NO_CACHE: frozenset[str] = frozenset(["granite4_vision", "openai-gpt", "recurrent_gemma", "reformer", "xlm", "xlnet"])
"""Model types without `past_key_values` from which a row could be continued."""

NOT_RELOADABLE: dict[str, str] = {
    "emu3": "AutoModelForCausalLM builds Emu3ForCausalLM, whose saved Emu3TextConfig it does not take back",
    "mllama": "AutoModelForCausalLM builds MllamaForCausalLM, whose saved MllamaTextConfig it does not take back",
    "shieldgemma2": "it builds Gemma3ForConditionalGeneration, and does not read the names of its saved weights",
}
"""Model types whose saved checkpoint `from_pretrained` of the same Auto class refuses, each with the reason."""
