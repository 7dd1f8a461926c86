"""Names that models give to the parts of a transformer, most common first. Each is used by at least one model."""

BACKBONES = ("model", "transformer", "gpt_neox", "decoder", "model.decoder", "backbone", "model.language_model")

LAYERS = ("layers", "h", "blocks", "block", "layer")

EMBED_TOKENS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "embeddings", "tok_embeddings", "word_embedding")

# `embedding_norm` is what LFM calls its final norm. It comes last: in a model with a norm after its embeddings and
# another after its layers, the second is the final norm.
LN_FINAL = (
    "norm",
    "ln_f",
    "final_layernorm",
    "final_layer_norm",
    "final_norm",
    "norm_f",
    "ln_out",
    "out_norm",
    "output_layernorm",
    "layer_norm",
    "layernorm",
    "LayerNorm",
    "ln",
    "embedding_norm",
)

LM_HEAD = ("lm_head", "embed_out", "output_projection", "proj_out", "head", "lm_loss")

SELF_ATTN = (
    "self_attn",
    "attn",
    "attention",
    "self_attention",
    "self_att",
    "norm_attn_norm",
    "multi_head_attention",
    "rel_attn",
    "SelfAttention",
    "LocalSelfAttention",
    "TransientGlobalSelfAttention",
    "cross_attn",
)

# In the layers of a decoder: the attention to what the encoder returns.
CROSS_ATTN = (
    "encoder_attn",
    "EncDecAttention",
    "cross_attn",
    "crossattention",
    "cross_attention",
)

# Sequence mixers that need not be softmax attention. Their class says what they are.
MIXERS = ("linear_attn", "mamba", "conv", "mixer", "temporal_block", "mlstm_layer")

MLP = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe", "mlp_block", "shared_mlp", "ff", "DenseReluDense")

# Feed-forwards without a module of their own: (first projection, last projection).
MLP_SPANS = (("fc1", "fc2"), ("intermediate", "output.dense"), ("layer_1", "layer_2"))

# The norm inside an attention module that adds the residual stream by itself (XLNet).
CLOSING_NORM = "layer_norm"
